"""Latents of a dot that moves as its controls say, as a dataset and as tensors, and world models that are not blank."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from owl.data import codecs
from owl.data.scan import write_index
from owl.data.shards import DatasetInfo, ShardWriter
from owl.models.world_model import Controls, Streams, WorldTransformer
from tests.helpers.shards import AXES, BUTTONS, DESCRIPTIONS
from tests.helpers.tiny import tiny_experiment

LATENT = (2, 4, 6)
SHAPES = {"latent": [*LATENT], "audio_latent": [2, 3], "motion_latent": [1, 4, 6], "conditioning_latent": [1, 4, 6]}
SHAPES["depth_latent"] = SHAPES["conditioning_latent"]
FINGERPRINT = "00112233445566ff"


def streams(*names: str, video: Sequence[int] = LATENT, patch: int = 2, channels: int = 1) -> dict[str, Any]:
    """Declares streams: the video's, and of "audio", "motion" and "conditioning", the latter two of ``channels``."""
    grid = {"shape": [channels, *video[1:]], "patch": patch}
    others = {"audio": {"shape": [2, 3]}, "motion": grid, "conditioning": grid | {"role": "given"}}
    declared = {"video": {"shape": [*video], "patch": patch, "modality": "latent"}}
    return {"streams": declared | {name: others[name] for name in names}}


TINY: dict[str, Any] = {
    **streams(),
    "buttons": BUTTONS,
    "axes": AXES,
    "width": 32,
    "depth": 2,
    "heads": 2,
    "mlp_ratio": 2.0,
    "window": 2,
    "global_window": 4,
    "global_every": 2,
}


def lively(seed: int = 0, **changes: Any) -> WorldTransformer:
    """A tiny world model whose layers all do something: those that start at zero would hide what tests look for."""
    network = WorldTransformer(**TINY | changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if name.endswith("norm.weight"):
                parameter.add_(1)  # attention that looks at some places more than at others
    return network.eval()


def draw(network: WorldTransformer, frames: int, batch: int = 1, seed: int = 0) -> tuple[Streams, Tensor, Controls]:
    """Latents, noise levels and controls for a network."""
    generator = torch.Generator().manual_seed(seed)
    latents = {
        name: torch.randn(batch, frames, *stream.shape, generator=generator)
        for name, stream in network.generated.items()
    }
    level = torch.rand(batch, frames, generator=generator)
    buttons = (torch.rand(batch, frames, len(network.buttons), generator=generator) > 0.5).float()
    return latents, level, Controls(buttons, torch.randn(batch, frames, len(network.axes), generator=generator) * 3)


def render(episode: int, frames: int, seed: int = 0) -> dict[str, np.ndarray]:
    """One episode: [frames, ...] of every latent and of the controls; the dot moves by axis 0, around the edges."""
    rng = np.random.default_rng((seed, episode))
    _, height, width = LATENT
    moves = rng.integers(-1, 2, frames)
    places = rng.integers(width) + moves.cumsum()
    row = int(rng.integers(height))
    dot = np.zeros((frames, 1, height, width))
    dot[np.arange(frames), 0, row, places % width] = 1
    controls = np.stack([moves == 0, moves < 0, moves > 0, moves, np.zeros(frames)], 1)
    sound = np.stack([np.full((2, 3), move) + rng.normal(0, 0.1, (2, 3)) for move in moves])
    arrays = {"latent": np.concatenate([dot, 1 - 2 * dot], 1), "audio_latent": sound, "motion_latent": dot}
    arrays["conditioning_latent"] = arrays["depth_latent"] = dot
    return {name: array.astype(np.float16) for name, array in arrays.items()} | {
        "controls": controls.astype(np.float32)
    }


def make_latents(
    root: str | Path,
    lengths: Sequence[int] = (12, 12, 12, 12),
    modalities: Sequence[str] = ("latent", "controls"),
    fingerprint: str = FINGERPRINT,
    stride: int = 1,
) -> Path:
    """Write a finished dataset of latents, two episodes a shard; the last two are "validation" and "test".

    Motion is described as that over ``stride`` frames.
    """
    names = [f"episode-{number:03d}" for number in range(len(lengths))]
    arrays = [render(number, frames) for number, frames in enumerate(lengths)]
    described = {}
    for name in modalities:
        if name == "controls":
            described[name] = DESCRIPTIONS["controls"]
            continue
        values = np.concatenate([episode[name] for episode in arrays[:-2]]).astype(np.float64)
        axes = tuple(axis for axis in range(values.ndim) if axis != (values.ndim - 1 if name == "audio_latent" else 1))
        described[name] = {
            "extension": f"{name}.npy",
            "encoding": "npy float16",
            "shape": SHAPES[name],
            "posterior": "mean",
            "encoder": {"fingerprint": fingerprint, "class_path": "tests.Encoder", "checkpoint": "none"},
            "mean": values.mean(axes).tolist(),
            "std": values.std(axes).tolist(),
        } | ({"stride": stride} if name == "motion_latent" else {})
    splits = {"train": names[:-2], "validation": names[-2:-1], "test": names[-1:]}
    DatasetInfo(35.0, (32, 48), described, splits, {"kind": "synthetic"}, "test").save(root)
    for shard in range(0, len(names), 2):
        with ShardWriter(root, shard // 2) as writer:
            for number in range(shard, min(shard + 2, len(names))):
                for frame in range(lengths[number]):
                    members = {
                        described[name]["extension"]: codecs.encode_array(arrays[number][name][frame])
                        for name in modalities
                    }
                    writer.write(names[number], frame, members)
    write_index(root)
    return Path(root)


def dot_experiment(dataset: Path, **trainer: Any) -> dict[str, Any]:
    """Return the configuration of a WorldModel that trains in seconds on :func:`make_latents`."""
    experiment = tiny_experiment(dataset, **trainer)
    experiment["model"] = {
        "class_path": "owl.recipes.world_model.WorldModel",
        "init_args": {
            "network": {
                "class_path": "owl.models.world_model.WorldTransformer",
                "init_args": dict(TINY),
            },
            "warmup_steps": 2,
        },
    }
    del experiment["data"]["init_args"]["size"]
    experiment["data"]["init_args"] |= {"modalities": ["latent", "controls"], "length": 5}
    return experiment


def tiny_self_forcing(dataset: Path, world_model: str | Path, **trainer: Any) -> dict[str, Any]:
    """Return the configuration of a SelfForcing that trains in seconds, from an export of :data:`TINY`."""
    experiment = dot_experiment(dataset, **trainer)
    arguments = {"student": str(world_model), "teacher": str(world_model), "forcing": "teacher", "window": 4}
    arguments |= {"steps": 2, "frames": 4, "gradient_frames": 2, "context": 2, "guidance": 2.0, "critic_steps": 2}
    arguments |= {
        name: {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "betas": [0.0, 0.99]}}
        for name in ("optimizer", "critic_optimizer")
    }
    experiment["model"] = {"class_path": "owl.recipes.self_forcing.SelfForcing", "init_args": arguments}
    experiment["data"]["init_args"]["length"] = 6
    return experiment


def tiny_consistency(dataset: Path, world_model: str | Path, **trainer: Any) -> dict[str, Any]:
    """Return the configuration of a CausalConsistency that trains in seconds, from an export of :data:`TINY`."""
    experiment = dot_experiment(dataset, **trainer)
    recipe = "owl.recipes.causal_consistency.CausalConsistency"
    arguments = {"teacher": str(world_model), "intervals": 8, "guidance": 2.0, "warmup_steps": 2}
    experiment["model"] = {"class_path": recipe, "init_args": arguments}
    return experiment
