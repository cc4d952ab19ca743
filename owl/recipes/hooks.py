"""Hooks of Lightning that several recipes share."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from owl.latents import check_encoder


class ChecksEncoder(LightningModule):
    """Checks before anything runs that the network, also of a resumed checkpoint, belongs to the latents of the data.

    A subclass sets ``_described`` in its ``setup``, to the result of `owl.latents.described`.
    """

    network: Any
    _described: tuple[Any, str]

    def check_latents_of_network(self) -> None:
        """Raise an OwlError if the network was trained on the latents of another encoder."""
        check_encoder(self.network, *self._described)

    def on_fit_start(self) -> None:
        """Check a resumed checkpoint."""
        self.check_latents_of_network()

    def on_validation_start(self) -> None:
        """Check a loaded checkpoint."""
        self.check_latents_of_network()

    def on_test_start(self) -> None:
        """Check a loaded checkpoint."""
        self.check_latents_of_network()


class SeedsByWindow(LightningModule):
    """Keeps the indices of a batch's windows, which seed its noise, where they are read without waiting for a GPU."""

    def transfer_batch_to_device(self, batch: dict[str, Tensor], device: torch.device, dataloader_idx: int) -> Any:
        """Move everything but ``window``, which stays on the CPU."""
        moved: dict[str, Tensor] = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved | {name: batch[name] for name in ("window",) if name in batch}
