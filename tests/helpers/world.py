"""All that a world model needs, tiny and real: footage, autoencoder, latents, world and inverse dynamics models."""

import shutil
from datetime import timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout, default_pg_timeout

from owl import models
from owl.callbacks.rollouts import Rollouts
from tests.helpers.shards import AXES, BUTTONS, make_dataset
from tests.helpers.tiny import owl_here, tiny_experiment, tiny_inverse_dynamics, write_config

STRIDE = 2
FOOTAGE = "data/doom-96x160-world"  # named as in the how-to pages
LATENTS = "data/doom-96x160-world-latents"
AUTOENCODER = "runs/quickstart/checkpoints/last.ckpt"
WORLD_MODEL = "runs/world_model_quickstart/checkpoints/last.ckpt"
INVERSE_DYNAMICS = "runs/inverse_dynamics_quickstart/checkpoints/last.ckpt"


class ImpatientRollouts(Rollouts):
    """Rollouts that take far longer than processes wait for each other elsewhere."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Let them wait for a tenth of a second."""
        trainer.strategy.barrier()
        _set_pg_timeout(timedelta(seconds=0.1))
        super().on_validation_epoch_end(trainer, pl_module)
        _set_pg_timeout(default_pg_timeout)


def tiny_world_model(dataset: str | Path, **trainer: Any) -> dict[str, Any]:
    """Return the configuration of a WorldModel that trains in a second on latents of :func:`tiny_experiment`'s VAE."""
    experiment = tiny_experiment(Path(dataset), **trainer)
    experiment["model"] = {
        "class_path": "owl.recipes.world_model.WorldModel",
        "init_args": {
            "network": {
                "class_path": "owl.models.world_model.WorldTransformer",
                "init_args": {
                    "streams": {"video": {"shape": [4, 4, 6], "patch": 2, "modality": "latent"}},
                    "buttons": BUTTONS,
                    "axes": AXES,
                    "width": 32,
                    "depth": 1,
                    "heads": 2,
                    "window": 4,
                },
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            "warmup_steps": 2,
        },
    }
    experiment["data"]["init_args"] |= {"modalities": ["latent", "controls"], "length": 4, "stride": STRIDE}
    del experiment["data"]["init_args"]["size"]
    return experiment


def train(folder: Path, name: str, configuration: dict[str, Any]) -> None:
    """Fit a configuration as the run ``name`` in ``folder``."""
    write_config(folder / f"{name}.yaml", configuration)
    assert owl_here("fit", "--config", f"{name}.yaml", "--name", name, cwd=folder) == 0


def save_run(folder: Path, name: str, network: nn.Module, data: dict[str, Any] | None = None) -> None:
    """Write a network as the last checkpoint of the run ``name``, in place of seconds of training.

    Args:
        folder: Where "runs" is.
        name: Of the run.
        network: Untrained.
        data: Arguments of the data module, such as the stride of a world model.
    """
    described = {"networks": {"network": models.describe(network)}, "config": {"data": {"init_args": data or {}}}}
    path = folder / "runs" / name / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    state = {f"network.{tensor}": value for tensor, value in network.state_dict().items()}
    torch.save({"state_dict": state, "owl": described}, path)


def stir(checkpoint: Path) -> None:
    """Move all weights of a checkpoint, so that frames depend on everything: a trained one has no zeros."""
    content = torch.load(checkpoint, weights_only=True)
    random = torch.Generator().manual_seed(0)
    for name, weights in content["state_dict"].items():
        if weights.is_floating_point() and not name.endswith(("_mean", "_std")):
            weights.add_(0.1 * torch.randn(weights.shape, generator=random))
    torch.save(content, checkpoint)


def make_world(folder: Path) -> Path:
    """Make all of the above in a folder: 4 episodes of 40 frames of 32x48 pixels, every run of two steps.

    It is made once in a process, and copied.
    """
    return Path(shutil.copytree(_world().name, folder, dirs_exist_ok=True))


@cache
def _world() -> TemporaryDirectory:
    """Make them in a folder that is deleted when the process ends."""
    temporary = TemporaryDirectory()
    folder = Path(temporary.name)
    make_dataset(folder / FOOTAGE, episodes=4, frames=40, size=(32, 48), modalities=("rgb", "controls"))
    train(folder, "quickstart", tiny_experiment(Path(FOOTAGE), max_steps=2))
    assert owl_here("data", "encode", AUTOENCODER, FOOTAGE, LATENTS, cwd=folder) == 0
    train(folder, "world_model_quickstart", tiny_world_model(LATENTS, max_steps=2))
    configuration = tiny_inverse_dynamics(Path(FOOTAGE), max_steps=2)
    configuration["data"]["init_args"] |= {"stride": STRIDE}
    train(folder, "inverse_dynamics_quickstart", configuration)
    return temporary
