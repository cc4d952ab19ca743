"""A student, its teacher and its critic: tiny, of random weights, and what one step of each does."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader

from owl import models
from owl.data.shards import DatasetInfo
from owl.latents import load_latent_stats
from owl.models.world_model import WorldTransformer
from owl.recipes.self_forcing import SelfForcing
from tests.helpers.latents import draw, lively, make_latents, streams, tiny_self_forcing
from tests.helpers.tiny import quiet_trainer, write_config

SOUND = streams("audio")
FRAMES_OF_CLIPS = 7
RATE = 0.02


def make_lab(folder: Path) -> Path:
    """Exports of a silent world model and of one with sound, a dataset, and an experiment, in a folder."""
    make_latents(folder / "data", (12, 12, 12, 12))
    for name, network in (("world", lively()), ("sound", lively(**SOUND)), ("other", lively(seed=1, **SOUND))):
        models.save(network, folder / name)
    described(folder / "world", folder / "data")
    write_config(folder / "tiny.yaml", tiny_self_forcing(Path("data"), "world"))
    return folder


def described(export: Path, dataset: Path) -> None:
    """Give an exported network the statistics and the encoder of a dataset."""
    network = models.load(export)
    load_latent_stats(network, DatasetInfo.load(dataset).modalities, str(dataset))
    models.save(network, export)


class Given(SelfForcing):
    """Trains on latents that nothing describes."""

    def setup(self, stage: str) -> None:
        """Nothing to check."""

    def on_fit_start(self) -> None:
        """Nothing to check."""


def recipe(lab: Path, **changes: Any) -> Given:
    settings: dict[str, Any] = {"student": str(lab / "sound"), "teacher": str(lab / "other"), "forcing": "teacher"}
    settings |= {"steps": 2, "shift": 2.0, "frames": 5, "gradient_frames": 2, "window": 4, "context": 2}
    settings |= {"guidance": 2.5, "critic_steps": 2, "clip": None}
    settings |= {name: lambda p: SGD(p, lr=RATE) for name in ("optimizer", "critic_optimizer")}
    return Given(**{**settings, **changes})


def batches(count: int, size: int = 3) -> list[dict[str, Tensor]]:
    network = lively(**SOUND)
    found = []
    for number in range(count):
        latents, _, controls = draw(network, FRAMES_OF_CLIPS, size, seed=number)
        stored = {network.latent_modalities[name]: x for name, x in latents.items()}
        window = torch.arange(size) + size * number
        found.append(stored | {"buttons": controls.buttons, "axes": controls.axes, "window": window})
    return found


def trained(made: Given, data: list[dict[str, Tensor]], folder: Path, *callbacks: Callback, **options: Any) -> Given:
    options = {"max_steps": len(data) // made.accumulate, "log_every_n_steps": 1, **options}
    quiet_trainer(folder, callbacks=list(callbacks), **options).fit(made, DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    return made


def weights(network: WorldTransformer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def moved(network: WorldTransformer, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of one step of SGD."""
    return {name: (before[name] - p.detach()) / RATE for name, p in network.named_parameters()}
