"""The smallest recipe with two optimisers: one network copies pictures, another one tells the copies apart."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Adam

from owl.distributed.sharding import shard
from owl.optim import MuonAdamW
from owl.optim.configuration import with_schedule
from owl.optim.stepping import manual_step, only_towards
from tests.helpers.tiny import tiny_experiment


class Players(LightningModule):
    """A relativistic loss and, where wanted, a penalty of the discriminator's gradient on real pictures: R3GAN's.

    Args:
        accumulate: Batches that make a step.
        clip: Largest norm of each network's gradients.
        penalty: Weight of the squared gradient; needs a second backward, for which FSDP2 does not keep the weights.
        final_lr: Of both schedules.
    """

    def __init__(
        self, accumulate: int = 1, clip: float | None = 0.5, penalty: float = 0.0, final_lr: float = 0.5
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.accumulate, self.clip = accumulate, clip
        self.generator = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1))
        self.discriminator = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.SiLU(), nn.Conv2d(8, 1, 3))
        self.penalty = penalty
        self.final_lr = final_lr

    def configure_model(self) -> None:
        """Spread the networks where there is a mesh."""
        if self.device_mesh is not None:
            for network in (self.generator, self.discriminator):
                shard(network, self.device_mesh["data_parallel"])

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Those of generator and discriminator."""
        real = pictures(batch)
        fake = self.generator(real)
        true = self.discriminator(real)
        adversarial = only_towards(fake, lambda x: F.softplus(true.detach() - self.discriminator(x)).mean())
        generator = F.l1_loss(fake, real) + 0.1 * adversarial
        discriminator = F.softplus(self.discriminator(fake.detach()) - true).mean()
        return generator, discriminator

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Both learn."""
        loss = torch.stack(self.losses(batch)).sum()
        if self.penalty:
            real = pictures(batch).requires_grad_()
            (gradient,) = torch.autograd.grad(self.discriminator(real.view_as(real)).sum(), real, create_graph=True)
            loss = loss + self.penalty * gradient.square().sum((1, 2, 3)).mean()
        self.log("train/loss", loss)
        manual_step(self, loss, batch_idx, self.accumulate, self.clip)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """How far copies are from the pictures."""
        real = pictures(batch)
        self.log("val/l1", F.l1_loss(self.generator(real), real), sync_dist=True, batch_size=len(real))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One for each network, each with its own schedule."""
        optimizers = MuonAdamW(self.generator.parameters(), lr=3e-3), Adam(self.discriminator.parameters(), lr=1e-3)
        return [with_schedule(self, optimizer, 2, self.final_lr, self.accumulate) for optimizer in optimizers]


def pictures(batch: dict[str, Tensor]) -> Tensor:
    """``rgb`` of a batch, uint8[B, T, 3, H, W], as float[B * T, 3, H, W] in [-1, 1]."""
    return batch["rgb"].flatten(0, 1).float() / 127.5 - 1


def tiny_players(dataset: Path, **options: Any) -> dict[str, Any]:
    """Return the configuration of Players that trains in seconds on a dataset of tests/helpers/shards.py."""
    experiment = tiny_experiment(dataset)
    experiment["model"] = {"class_path": "tests.helpers.players.Players", "init_args": options}
    return experiment
