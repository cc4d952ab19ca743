"""No shipped configuration rots: every YAML of experiments/ and configs/ trains two steps, at a tiny size."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from owl.commands.sweep import check, load_plan
from owl.data.game import find_scenario
from owl.data.recorder import GameRecording
from owl.models import save
from owl.models.audio_autoencoder import AudioAutoencoder
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.world_model import WorldTransformer
from tests.helpers.autoencoders import ENCODER, save_audio_autoencoder, save_autoencoder
from tests.helpers.latents import FINGERPRINT, LATENT, draw, lively, make_latents, streams
from tests.helpers.proxies import save_proxy
from tests.helpers.shards import AXES, BUTTONS, make_dataset
from tests.helpers.tiny import REPOSITORY, owl_here

EXPERIMENTS = sorted((REPOSITORY / "experiments").glob("*.yaml"))
SWEEPS = sorted((REPOSITORY / "experiments" / "sweeps").glob("*.yaml"))
NETWORKS = sorted((REPOSITORY / "configs" / "models").glob("*.yaml"))
TRAINERS = sorted((REPOSITORY / "configs" / "trainer").glob("fp8_*.yaml"))
"""Tested in tests/precision."""
CLUSTERS = [REPOSITORY / "configs" / "cluster" / "skypilot.yaml"]
"""A job, not a part of an experiment; tested in tests/commands/test_submit.py."""
STRIDE = 2  # of world models with sound or motion
SMALLEST = 64  # pixels: what crops for LPIPS need

# What is changed; everything else stays as it is shipped.
DATA = {"batch_size": 2, "num_workers": 0, "validation_windows": 2, "record": "null", "cache_dir": "null"}
TRAINER = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "num_nodes": 1, "max_steps": 2, "callbacks": "null"}


def network_of(path: Path, shipped: dict[str, Any]) -> dict[str, Any]:
    """The network's class_path and init_args, in the experiment itself or in a file of its own."""
    network = shipped["model"]["init_args"]["network"]
    return network if isinstance(network, dict) else yaml.safe_load((path.parent / network).read_text())


def shrink_inverse_dynamics(network: dict[str, Any]) -> dict[str, Any]:
    """Fewer channels, and the controls of the tests' footage."""
    return {"size": [32, 48], "width": 16, "hidden": 16, "buttons": BUTTONS, "axes": AXES}


def shrink(network: dict[str, Any]) -> dict[str, Any]:
    """Smaller pictures of the same shape, one block a stage, two groups of channels in each: the same parts."""
    size, latent = network["size"], network["latent_size"]
    divisor = next(
        d for d in (4, 2, 1) if not any(n % d for n in (*size, *latent)) and (size[0] >= SMALLEST * d or d == 1)
    )
    width = 2 * (network.get("group_size") or 8)
    return {
        "size": [side // divisor for side in size],
        "latent_size": [side // divisor for side in latent],
        "latent_channels": min(network["latent_channels"], width // 2),
        "widths": [width] * len(network["widths"]),
        "blocks": [min(count, 1) for count in network["blocks"]],
    }


def shrink_audio(network: dict[str, Any]) -> dict[str, Any]:
    """Fewer channels in as many stages."""
    return {"widths": [4] * len(network["widths"]), "latent_channels": 4}


def shrink_world_model(network: dict[str, Any]) -> dict[str, Any]:
    """Fewer channels and layers, and the latents and controls of the tests."""
    shapes = {"video": list(LATENT), "audio": [2 * STRIDE, 3]}
    declared = {
        name: stream
        | {"shape": shapes.get(name, [1, *LATENT[1:]])}
        | ({"patch": min(stream["patch"], 2)} if "patch" in stream else {})
        for name, stream in network["streams"].items()
    }
    return {"streams": declared, "width": 32, "heads": 2, "depth": 4, "buttons": BUTTONS, "axes": AXES}


def shrink_half(network: dict[str, Any]) -> dict[str, Any]:
    """One half of an autoencoder for 8 pixels a position, as `save_autoencoder` makes it, with at most four stages."""
    stages = min(len(network["widths"]), 4)
    return {"widths": [16] * stages, "blocks": [1] * stages, "patch": 8 >> (stages - 1), "group_size": 8}


def shrink_discriminator(network: dict[str, Any]) -> dict[str, Any]:
    """Fewer channels in as many stages."""
    return {"widths": [8] * len(network["widths"]), "blocks": [1] * len(network["widths"]), "group_size": 8}


def shrink_audio_discriminator(network: dict[str, Any]) -> dict[str, Any]:
    """Fewer channels in as many networks and layers."""
    return {"width": 4, "period_widths": [4] * len(network["period_widths"])}


def shrink_diffusion(network: dict[str, Any]) -> dict[str, Any]:
    """Fewer channels and layers; patches that divide the latents of a tiny proxy."""
    return {"width": 32, "depth": 1, "heads": 2} | ({"patch": [4, 2]} if "proxy" in network else {})


SHRINK = {
    "owl.models.audio_autoencoder.AudioAutoencoder": shrink_audio,
    "owl.models.audio_discriminators.CombinedDiscriminator": shrink_audio_discriminator,
    "owl.models.image_autoencoder.ImageAutoencoder": shrink,
    "owl.models.multimodal_autoencoder.MultimodalAutoencoder": shrink,
    "owl.models.image_decoder.ImageDecoder": shrink_half,
    "owl.models.image_encoder.ImageEncoder": shrink_half,
    "owl.models.inverse_dynamics.InverseDynamicsModel": shrink_inverse_dynamics,
    "owl.models.diffusion_decoder.DiTDecoder": shrink_diffusion,
    "owl.models.discriminators.ResNetDiscriminator": shrink_discriminator,
    "owl.models.world_model.WorldTransformer": shrink_world_model,
}
"""How the network of each class is made small."""
NETWORK_CLASSES = {
    f"{c.__module__}.{c.__qualname__}": c for c in (AudioAutoencoder, ImageAutoencoder, WorldTransformer)
}
"""What configs/models holds."""


def small_model(path: Path, shipped: dict[str, Any], folder: Path) -> tuple[tuple[int, int] | None, list[str]]:
    """The size of pictures, and options that make every network small."""
    model = shipped["model"]["init_args"]
    if ("teacher" in model or "student" in model) and "autoencoder" not in model:
        data = shipped["data"]["init_args"]
        world_model = save_world_model(folder / "world_model", "audio_latent" in data["modalities"])
        clips = f"{{stride: {data.get('stride', 1)}, length: {data['length']}}}"
        (world_model / "provenance.yaml").write_text(clips)
        changes = {name: str(world_model) for name in ("teacher", "student") if name in model}
        if "depth" in model:
            changes |= {"forcing": "teacher", "depth": 1}
        if "gradient_frames" in model:
            changes |= {"forcing": "teacher", "frames": model["gradient_frames"] + 1}
        return None, options("model", changes)
    if "autoencoder" not in model:
        network = network_of(path, shipped)
        small = SHRINK[network["class_path"]](network["init_args"])
        return small.get("size"), options("model.network", small)
    size = None if "audio" in path.stem else (SMALLEST, SMALLEST * 3 // 2)
    if size is None:
        stage_1 = save_audio_autoencoder(folder / "autoencoder")
    else:
        stage_1 = save_autoencoder(folder / "autoencoder", size, (size[0] // 8, size[1] // 8))
    changes = options("model", {"autoencoder": str(stage_1)})
    if "segments" in model:
        changes += options("model", {"segments": DATA["batch_size"]})
    if "lpips_crop" in model:
        changes += options("model", {"lpips_crop": SMALLEST})
    for name in ("network", "discriminator"):
        if name in model:
            part = model[name]
            changes += options(f"model.{name}", SHRINK[part["class_path"]](part["init_args"]))
            if "proxy" in part["init_args"]:
                save_proxy(folder / "proxy")
                changes += options(f"model.{name}", {"proxy": str(folder / "proxy")})
    return size, changes


def save_world_model(folder: Path, sound: bool) -> Path:
    """Export a tiny world model of the latents of `make_latents`."""
    declared = streams("audio") if sound else streams()
    if sound:
        declared["streams"]["audio"] = {"shape": [2 * STRIDE, 3]}
    network = lively(**declared)
    for name in network.streams:
        getattr(network, f"{name}_encoder").copy_(torch.tensor(list(bytes.fromhex(FINGERPRINT)), dtype=torch.uint8))
    save(network, folder)
    return folder


def options(group: str, values: dict[str, Any]) -> list[str]:
    return [
        f"--{group}.{name}={json.dumps(value) if isinstance(value, list | dict) else value}"
        for name, value in values.items()
    ]


def test_there_is_something_to_test() -> None:
    assert len(EXPERIMENTS) >= 4
    assert len(NETWORKS) >= 4
    shipped = {path for folder in ("experiments", "configs") for path in (REPOSITORY / folder).rglob("*.yaml")}
    assert shipped == {*EXPERIMENTS, *SWEEPS, *NETWORKS, *TRAINERS, *CLUSTERS}


def make_tiny(path: Path, folder: Path) -> list[str]:
    """Make the data and checkpoints that an experiment needs at a tiny size; returns the options for two steps."""
    shipped = yaml.safe_load(path.read_text())
    size, changes = small_model(path, shipped, folder)
    wanted = shipped["data"]["init_args"]
    length = max(wanted.get("length", 1), wanted.get("validation_length", 1))
    frames = length * wanted.get("stride", 1) + 3  # some windows in each episode
    modalities = wanted.get("modalities", ["rgb"])
    if "trajectory" in modalities:
        make_latents(folder / "latents", [frames] * 4)
        follow = ("data", "trajectories", "world_model", "latents", "data", "--points", "2", "--steps", "2")
        assert owl_here(*follow, cwd=folder) == 0
        data = folder / "data"
    elif "latent" in modalities:
        data = make_latents(folder / "data", [frames] * 4, modalities, stride=wanted.get("stride", 1))
    else:
        data = make_dataset(folder / "data", 3, frames, size or (24, 40), modalities)
    trainer = TRAINER
    if (
        "autoencoder" in shipped["model"]["init_args"] and "callbacks" in shipped["trainer"]
    ):  # the encoder is needed, and stands by its name alone
        (callback,) = shipped["trainer"]["callbacks"]
        assert callback["class_path"] == ENCODER
        assert callback["init_args"]["path"] == "${model.init_args.autoencoder}"
        trainer = {name: value for name, value in TRAINER.items() if name != "callbacks"}
    return [*changes, *options("data", {"path": str(data), **DATA}), *options("trainer", trainer)]


def train_tiny(path: Path, folder: Path, *changes: str) -> Path:
    """Train an experiment two steps at a tiny size; returns the run's folder."""
    assert owl_here("fit", "--config", path, *make_tiny(path, folder), *changes, cwd=folder) == 0
    run = folder / "runs" / path.stem
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert all(math.isfinite(value) for value in metrics.values())
    return run


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that were to be compiled, and are not: it takes minutes, and others test that it keeps results."""
    found: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: found.append(module))
    return found


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_trains_two_steps(path: Path, tmp_path: Path, compiled: list[nn.Module]) -> None:
    run = train_tiny(path, tmp_path)
    shipped = yaml.safe_load(path.read_text())
    assert bool(compiled) == shipped["model"]["init_args"].get("compile", False)
    monitor = shipped.get("checkpoint", {}).get("monitor")
    assert monitor is None or (run / "checkpoints" / "best.ckpt").exists()


def test_an_experiment_records_what_there_is_to_play() -> None:
    recorded = [yaml.safe_load(path.read_text())["data"]["init_args"].get("record") for path in EXPERIMENTS]
    scenarios = {name for record in recorded if record for name in GameRecording(**record).scenarios()}
    assert scenarios
    for name in scenarios:
        find_scenario(name)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_fits_the_experiment_that_it_names(path: Path) -> None:
    command = re.search(r"python -m owl sweep --config (\S+) --sweep (\S+)", path.read_text())
    assert command.group(2) == str(path.relative_to(REPOSITORY))
    check(load_plan(path), str(path), [f"--config={REPOSITORY / command.group(1)}"])


def fault(network: AudioAutoencoder | ImageAutoencoder | WorldTransformer) -> torch.Tensor:
    """Something that training can lower."""
    if isinstance(network, WorldTransformer):
        return (network(*draw(network, 4))["video"] - 1).square().mean()
    if isinstance(network, AudioAutoencoder):
        audio = 0.1 * torch.randn(1, 2, 2 * network.hop, generator=torch.Generator().manual_seed(0))
        return (network(audio, sample=False)[0] - audio).square().mean()
    image = torch.rand(1, 3, *network.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (network(image, sample=False)[0] - image).square().mean()


@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.stem)
def test_a_network_can_be_built_as_shipped_and_learns_when_small(path: Path) -> None:
    shipped = yaml.safe_load(path.read_text())
    network_class = NETWORK_CLASSES[shipped["class_path"]]
    with torch.device("meta"):
        network_class(**shipped["init_args"])
    network = network_class(**shipped["init_args"] | SHRINK[shipped["class_path"]](shipped["init_args"]))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = fault(network)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
