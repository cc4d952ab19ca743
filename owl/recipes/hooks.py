"""Hooks of Lightning that several recipes share."""

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from owl.latents import check_encoder
from owl.metrics.latents import LatentStatistics


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


class MeasuresBatches(LightningModule):
    """Measures validation and test in the same way, with metrics that Lightning logs at the end of an epoch."""

    @abstractmethod
    def measure(self, batch: dict[str, Tensor], split: str) -> None:
        """Update and log every metric; the names in logs start with ``split``, "val" or "test"."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """See `measure`."""
        self.measure(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """See `measure`."""
        self.measure(batch, "test")


class MeasuresEpochs(LightningModule):
    """Measures validation and test in the same way, and logs what has been measured at the end of an epoch."""

    @abstractmethod
    def measure(self, batch: dict[str, Tensor]) -> None:
        """Update the metrics."""

    @abstractmethod
    def log_measured(self, split: str) -> None:
        """Log and reset the metrics; the names in logs start with ``split``, "val" or "test"."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """See `measure`."""
        self.measure(batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """See `measure`."""
        self.measure(batch)

    def on_validation_epoch_end(self) -> None:
        """See `log_measured`."""
        self.log_measured("val")

    def on_test_epoch_end(self) -> None:
        """See `log_measured`."""
        self.log_measured("test")


class DescribesLatents(MeasuresBatches):
    """Logs the statistics of the latents, and stores those of validation in the network that makes them.

    Attributes:
        network: An autoencoder.
        latents: Updated by ``measure``.
    """

    network: Any
    latents: LatentStatistics

    def on_validation_epoch_end(self) -> None:
        """Store the latent statistics in the network, for uses without a dataset of latents."""
        statistics = self.log_latents("val")
        self.network.latent_mean.copy_(statistics["mean"])
        self.network.latent_std.copy_(statistics["std"])

    def on_test_epoch_end(self) -> None:
        """Log the latents' statistics."""
        self.log_latents("test")

    def log_latents(self, split: str) -> dict[str, Tensor]:
        """Log and return the statistics of all latents of an epoch, and reset them."""
        statistics = self.latents.compute()
        self.latents.reset()
        scalars = {f"{split}/latent_{name}": value for name, value in statistics.items() if value.ndim == 0}
        # already the same on every rank, which Lightning cannot know
        self.log_dict({**scalars, f"{split}/tsr": self.network.tsr}, sync_dist=True)
        return statistics
