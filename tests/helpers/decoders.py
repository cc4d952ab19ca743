"""A decoder that does not carry its encoder, and the smallest recipe that exports several networks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from owl.nn.frozen import trained
from tests.helpers.players import pictures
from tests.helpers.tiny import tiny_experiment

SCALE = 8


class LatentDecoder(nn.Module):
    """Latents to pictures of 8 times the size.

    Args:
        latent: Shape (c, h, w).
    """

    def __init__(self, latent: Sequence[int] = (4, 4, 6)) -> None:
        super().__init__()
        self.config = {"latent": list(latent)}
        self.inputs = {"latent": tuple(latent)}
        self.register_buffer("latent_mean", torch.zeros(latent[0]))
        self.register_buffer("latent_std", torch.ones(latent[0]))
        self.register_buffer("latent_encoder", torch.zeros(8, dtype=torch.uint8))
        self.up = nn.ConvTranspose2d(latent[0], 3, SCALE, SCALE)

    def decode(self, latent: Tensor) -> Tensor:
        """float[B, c, h, w] to float[B, 3, H, W]."""
        return self.up(latent)


class PatchEncoder(nn.Module):
    """Pictures to latents of an eighth of the size."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.config = {"channels": channels}
        self.down = nn.Conv2d(3, channels, SCALE, SCALE)

    def forward(self, image: Tensor) -> Tensor:
        """float[B, 3, H, W] to float[B, c, h, w]."""
        return self.down(image)


class Pair(LightningModule):
    """Trains an encoder, a decoder, and a critic that is not needed afterwards."""

    exports = ("encoder", "decoder")

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder, self.decoder, self.critic = PatchEncoder(), LatentDecoder(), nn.Conv2d(3, 1, 4)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """All learn."""
        image = pictures(batch)
        copy = self.decoder.decode(self.encoder(image))
        return F.mse_loss(copy, image) + F.softplus(self.critic(copy.detach()) - self.critic(image)).mean()

    def configure_optimizers(self) -> Optimizer:
        """One for all."""
        return SGD(trained(self).values(), lr=0.1)


def tiny_pair(dataset: Path, **trainer: Any) -> dict[str, Any]:
    """Return the configuration of a Pair that trains in seconds on pictures of 32x48."""
    experiment = tiny_experiment(dataset, limit_val_batches=0, **trainer)
    experiment["model"] = {"class_path": "tests.helpers.decoders.Pair"}
    return experiment
