"""ONNX graphs give PyTorch's outputs: a decoder's pictures, and whole rollouts of a world model, step by step."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from owl.flow_matching import noise_levels
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.image_decoder import ImageDecoder
from owl.models.inverse_dynamics import InverseDynamicsModel
from owl.models.world_model import Controls, WorldTransformer
from owl.rollout import onnx_export
from owl.rollout.engine import Engine
from owl.rollout.onnx_export import TOLERANCE, StepGraph, export_onnx, largest_difference
from tests.helpers.errors import refused
from tests.helpers.latents import draw, lively, streams
from tests.helpers.shards import AXES, BUTTONS

CONTEXT, FRAMES = 2, 9
Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> tuple[WorldTransformer, StepGraph, Run]:
    """A model of video and sound with a sink, its graph, and the exported graph as a function."""
    network = lively(**streams("audio"), sink=1)
    with torch.no_grad():
        for name in ("video", "audio"):
            network.get_buffer(f"{name}_mean").fill_(0.3)
            network.get_buffer(f"{name}_std").fill_(1.7)
    path, comparison = export_onnx(network, tmp_path_factory.mktemp("onnx"))
    assert path.name == "step.onnx"
    assert comparison.difference <= TOLERANCE
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    graph = StepGraph(network)
    return network, graph, lambda inputs: session.run(graph.outputs, inputs)


def rolled(network: WorldTransformer, graph: StepGraph, run: Run, steps: int, level: float) -> list[dict[str, Tensor]]:
    """Roll out with nothing but calls of the graph, as a program without PyTorch would, with the engine's noise."""
    context, _, controls = draw(network, FRAMES)
    random = torch.Generator().manual_seed(7)

    def noise() -> dict[str, Tensor]:
        return {n: torch.randn(1, 1, *s.shape, generator=random) for n, s in network.generated.items()}

    def frame(prefix: str, latents: dict[str, Tensor], drawn: dict[str, Tensor], t: float, time: int) -> dict[str, Any]:
        shown = {f"{prefix}{n}": x for n, x in latents.items()} | {f"{prefix}{n}_noise": x for n, x in drawn.items()}
        played = {"buttons": controls.buttons[:, time : time + 1], "axes": controls.axes[:, time : time + 1]}
        return shown | {f"{prefix}{n}": x for n, x in played.items()} | {f"{prefix}level": torch.full((1, 1), t)}

    zeros = {n: torch.zeros(1, 1, *s.shape) for n, s in network.generated.items()}
    cache = {name: tensor.numpy() for name, tensor in graph.cached.items()}
    shown = [{n: x[:, t : t + 1] for n, x in context.items()} for t in range(CONTEXT)]
    noisy = [noise() if level else zeros for _ in range(CONTEXT)]
    generated = []
    for time in range(FRAMES - 1):
        known = time + 1 < CONTEXT
        estimate, drawn = zeros, zeros if known else noise()
        fresh = [] if known else [noise() for _ in range(steps)]
        for number, t in enumerate([1.0] if known else noise_levels(steps)):
            now = frame("", estimate, fresh[number - 1] if number else drawn, t, time + 1)
            before = frame("before_", shown[time], noisy[time], level, time)
            inputs = {name: x.numpy() for name, x in (now | before | {"time": torch.tensor(time)}).items()} | cache
            found = dict(zip(graph.outputs, run(inputs), strict=True))
            estimate = {n: torch.from_numpy(found[f"clean_{n}"]) for n in network.generated}
        cache = {name: found[f"next_{name}"] for name in graph.cached}
        if not known:
            shown.append(estimate)
            noisy.append(noise() if level else zeros)
            generated.append({n: x[:, 0] for n, x in estimate.items()})
    return generated


@pytest.mark.parametrize(("steps", "level"), [(1, 0.0), (1, 0.2), (2, 0.0)])
def test_a_rollout_is_that_of_the_engine(
    student: tuple[WorldTransformer, StepGraph, Run], steps: int, level: float
) -> None:
    """Longer than every window, so that slots of the cache are used again."""
    network, graph, run = student
    context, _, controls = draw(network, FRAMES)
    engine = Engine(network, noise_levels=noise_levels(steps), sampler="consistency", context_noise=level)
    known = Controls(controls.buttons[:, :CONTEXT], controls.axes[:, :CONTEXT])
    engine.reset({n: x[:, :CONTEXT] for n, x in context.items()}, known, seed=7)
    found = rolled(network, graph, run, steps, level)
    assert len(found) == FRAMES - CONTEXT
    for time, frame in enumerate(found, CONTEXT):
        expected = engine.step(controls.buttons[:, time], controls.axes[:, time]).latents
        for name, latent in frame.items():
            torch.testing.assert_close(latent, expected[name], atol=TOLERANCE, rtol=0)
            assert latent.std() > 0.1


@pytest.mark.parametrize("previous", [False, True])
def test_a_decoder_gives_the_same_pictures(previous: bool, tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "channels": 3,
        "size": (32, 48),
        "latent_size": (4, 6),
        "widths": [8, 16, 16],
        "blocks": [1, 1, 1],
    }
    network: nn.Module = (
        ImageDecoder(**shape, latent_channels=4, previous=True) if previous else ImageAutoencoder(**shape)
    )
    network.eval()
    path, comparison = export_onnx(network, tmp_path)
    assert path == tmp_path / "decoder.onnx"
    assert comparison.difference <= TOLERANCE
    assert "frames/s in onnxruntime" in str(comparison)
    inputs = [torch.randn(1, 4, 4, 6), torch.rand(1, 3, 32, 48) * 2 - 1][: 1 + previous]
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    fed = {item.name: x.numpy() for item, x in zip(session.get_inputs(), inputs, strict=True)}
    with torch.no_grad():
        expected = network.decode(*inputs)  # type: ignore[operator]
    torch.testing.assert_close(torch.from_numpy(session.run(["picture"], fed)[0]), expected, atol=TOLERANCE, rtol=0)


def test_an_output_of_nan_differs() -> None:
    whole, damaged = np.zeros(2, np.float32), np.array([0, np.nan], np.float32)
    assert np.isnan(largest_difference([whole, damaged], [torch.zeros(2)] * 2))  # the built-in max would skip it


class Deciding(nn.Module):
    """A decoder that branches on its input, which no graph can."""

    size, latent_channels, latent_size = (8, 8), 1, (8, 8)

    def decode(self, latent: Tensor) -> Tensor:
        return latent if float(latent.sum()) > 0 else -latent


class Random(Deciding):
    """A decoder with noise of its own."""

    def decode(self, latent: Tensor) -> Tensor:
        return latent + torch.randn_like(latent)


def test_what_has_no_graph_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = InverseDynamicsModel(buttons=BUTTONS, axes=AXES, size=(16, 24), width=16, hidden=16)
    for network, token in ((reader, "InverseDynamicsModel"), (Deciding(), "converted"), (Random(), "Random")):
        with refused("export.onnx", token, "--onnx"):
            export_onnx(network, tmp_path)
    monkeypatch.setattr(onnx_export, "MOST_BYTES", 10)
    with refused("export.onnx", "WorldTransformer", "GB"):
        export_onnx(lively(), tmp_path)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with refused("export.onnx-package", "onnxscript", "owl-platform[onnx]"):
        export_onnx(lively(), tmp_path)
    assert not list(tmp_path.iterdir())
