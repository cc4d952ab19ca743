"""The smallest recipe with two optimisers: one network copies pictures, another one distinguishes the copies."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Adam

from owl.distributed.sharding import shard
from owl.losses.adversarial import discriminator_loss, generator_loss, logits_and_penalty
from owl.optim import MuonAdamW
from owl.optim.configuration import with_schedule
from owl.optim.stepping import manual_step, only_towards
from tests.helpers.tiny import tiny_experiment


class Generator(nn.Sequential):
    """float[B, 3, H, W] -> the same shape; has a weight of its own beside those of its parts."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1))
        self.gain = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Copy."""
        copy: Tensor = self.gain * super().forward(x)
        return copy


class Players(LightningModule):
    """A relativistic loss and, where wanted, a penalty of the discriminator's gradient on real pictures: R3GAN's.

    Args:
        accumulate: Batches that make a step.
        clip: Largest norm of each network's gradients.
        penalty: Weight of the squared gradient; needs a second backward, for which FSDP2 does not keep the weights.
        penalty_every: Steps of the discriminator of which one has the penalty, so many times as strong.
        generator_every: Steps of which one is the generator's too.
        final_lr: Of both schedules.
    """

    def __init__(
        self,
        accumulate: int = 1,
        clip: float | None = 0.5,
        penalty: float = 0.0,
        penalty_every: int = 1,
        generator_every: int = 1,
        final_lr: float = 0.5,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.accumulate, self.clip = accumulate, clip
        self.generator = Generator()
        self.discriminator = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.SiLU(), nn.Conv2d(8, 1, 3))
        self.penalty, self.penalty_every = penalty, penalty_every
        self.generator_every = generator_every
        self.final_lr = final_lr

    def configure_model(self) -> None:
        """Spread the networks where there is a mesh."""
        if self.device_mesh is not None:
            for network in (self.generator, self.discriminator):
                shard(network, self.device_mesh["data_parallel"])

    def generator_loss(self, real: Tensor) -> Tensor:
        """Copies should look like the pictures, and not like copies."""
        fake, judged = self.generator(real), self.discriminator(real).detach()
        adversarial = only_towards(fake, lambda x: generator_loss(self.discriminator(x), judged))
        return F.l1_loss(fake, real) + 0.1 * adversarial

    def discriminator_loss(self, real: Tensor) -> Tensor:
        """Pictures should look truer than their copies."""
        with torch.no_grad():
            fake = self.generator(real)
        return discriminator_loss(self.discriminator(real), self.discriminator(fake))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Both learn."""
        real = pictures(batch)
        with manual_step(self, self.accumulate) as step:
            generator, discriminator = self.trainer.optimizers
            if step.due(self.generator_every):
                loss = self.generator_loss(real)
                step(generator, loss, self.clip)
                self.log("train/generator", loss)
            loss = self.discriminator_loss(real)
            if self.penalty and step.due(self.penalty_every):
                loss = loss + self.penalty_every * self.penalty * logits_and_penalty(self.discriminator, real)[1]
            step(discriminator, loss, self.clip)
            self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """How far copies are from the pictures."""
        real = pictures(batch)
        self.log("val/l1", F.l1_loss(self.generator(real), real), sync_dist=True, batch_size=len(real))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One for each network, each with its own schedule."""
        optimizers = MuonAdamW(self.generator.parameters(), lr=1e-3), Adam(self.discriminator.parameters(), lr=1e-3)
        return [with_schedule(self, optimizer, 2, self.final_lr, self.accumulate) for optimizer in optimizers]


def pictures(batch: dict[str, Tensor]) -> Tensor:
    """``rgb`` of a batch, uint8[B, T, 3, H, W], as float[B * T, 3, H, W] in [-1, 1]."""
    return batch["rgb"].flatten(0, 1).float() / 127.5 - 1


def tiny_players(dataset: Path, **options: Any) -> dict[str, Any]:
    """Return the configuration of Players that trains in seconds on a dataset of tests/helpers/shards.py."""
    experiment = tiny_experiment(dataset)
    experiment["model"] = {"class_path": "tests.helpers.players.Players", "init_args": options}
    return experiment
