"""The smallest recipe with frozen parts: a teacher beside the network, and a layer in its middle."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW

from owl.distributed.sharding import shard
from owl.nn.frozen import freeze, trained
from owl.optim.configuration import with_schedule
from tests.helpers.players import pictures
from tests.helpers.tiny import tiny_experiment


class Taught(LightningModule):
    """Learns what its teacher makes of pictures.

    Args:
        final_lr: Of the schedule.
    """

    def __init__(self, final_lr: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng(devices=[]):  # frozen parts have their weights from elsewhere, at every start
            torch.manual_seed(7)
            self.teacher = freeze(nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.SiLU(), nn.Conv2d(8, 4, 3, 1, 1)))
            middle = freeze(nn.Conv2d(8, 8, 3, 1, 1))
        self.network = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), middle, nn.SiLU(), nn.Conv2d(8, 4, 3, 1, 1))
        self.final_lr = final_lr

    def configure_model(self) -> None:
        """Spread both where there is a mesh."""
        if self.device_mesh is not None:
            for network in (self.network, self.teacher):
                shard(network, self.device_mesh["data_parallel"])

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """How far the network is from its teacher."""
        return F.mse_loss(self.network(pictures(batch)), self.teacher(pictures(batch)))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Learn."""
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure."""
        self.log("val/loss", self.loss(batch), sync_dist=True, batch_size=len(batch["rgb"]))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Of what is not frozen."""
        return with_schedule(self, AdamW(trained(self).values(), lr=3e-3), 2, self.final_lr)


class Shares(Callback):
    """Writes how many numbers of each frozen weight this process holds, and how many there are."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them to ``shares-<rank>.json``."""
        found = {}
        for name, weight in pl_module.named_parameters():
            if not weight.requires_grad:
                here = weight.to_local() if hasattr(weight, "to_local") else weight
                found[name] = [here.numel(), weight.numel()]
        Path(f"shares-{trainer.global_rank}.json").write_text(json.dumps(found))


def tiny_taught(dataset: Path, **options: Any) -> dict[str, Any]:
    """Return the configuration of Taught that trains in seconds on a dataset of tests/helpers/shards.py."""
    experiment = tiny_experiment(dataset)
    experiment["model"] = {"class_path": "tests.helpers.taught.Taught", "init_args": options}
    return experiment
