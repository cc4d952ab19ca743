"""Parts on a GPU against the same parts on a CPU in float32: attention, networks, engine, loader."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from owl.data.loader import GlobalBatches, ResumableLoader
from owl.data.windows import WindowDataset
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.world_model import Controls, Streams, WorldTransformer
from owl.nn.attention import BlockAttention, visible
from owl.precision.inference import probe
from owl.rollout.engine import Engine
from tests.gpu.conftest import Record
from tests.helpers.attention import DenseAttention
from tests.helpers.latents import draw, lively, streams
from tests.helpers.shards import make_dataset
from tests.nn.test_attention import packed

pytestmark = pytest.mark.gpu

AUTOENCODER: dict[str, Any] = {
    "size": (48, 80),
    "latent_size": (6, 10),
    "latent_channels": 4,
    "widths": [32, 64, 64],
    "blocks": [1, 1, 1],
}


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what was expected, in float64 on the CPU."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def on(device: torch.device, *parts: Any) -> tuple[Any, ...]:
    """Inputs of a network, moved."""

    def move(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: x.to(device) for name, x in part.items()}
        if isinstance(part, Controls):
            return Controls(part.buttons.to(device), part.axes.to(device))
        return part.to(device)

    return tuple(move(part) for part in parts)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("tokens", "width"), [(60, 64), (64, 64), (16, 32)])
def test_flex_attention_equals_dense_attention_on_the_cpu(
    gpu: torch.device, record: Record, dtype: torch.dtype, allowed: float, tokens: int, width: int
) -> None:
    frames = packed()
    seen = visible(frames, frames, window=2, sink=1)
    real = (frames.time >= 0).repeat_interleave(tokens, 1)[:, None, :, None]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 2, 20 * tokens, width, generator=generator).to(dtype) for _ in range(3)]
    found = []
    for device, way, precision in (
        (torch.device("cpu"), DenseAttention, torch.float32),
        (gpu, BlockAttention, dtype),
    ):
        leaves = [x.to(device, precision, copy=True).requires_grad_() for x in inputs]
        out = way(seen.to(device), tokens)(*leaves) * real.to(device)
        out.float().square().sum().backward()
        found.append([out, *(x.grad for x in leaves)])
    errors = [relative(b, a) for a, b in zip(*found, strict=True)]
    assert max(errors) < allowed, errors
    record(
        f"FlexAttention, {tokens} tokens a frame, heads of {width}, {str(dtype)[6:]}, against dense on the CPU",
        f"error of outputs {errors[0]:.1e}, of gradients {max(errors[1:]):.1e}",
    )


def world_loss(network: WorldTransformer, latents: Streams, level: Tensor, controls: Controls) -> Tensor:
    return torch.stack([v.float().square().mean() for v in network(latents, level, controls).values()]).sum()


def image_loss(network: ImageAutoencoder, image: Tensor) -> Tensor:
    return (network(image, sample=False)[0].float() - image).square().mean()


def gradients(network: nn.Module, loss: Tensor) -> Tensor:
    """Of all weights; compiled, one that is not used has a gradient of zero instead of none."""
    loss.backward()
    known = [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]
    return torch.cat([gradient.flatten().cpu() for gradient in known])


def image(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 48, 80, generator=torch.Generator().manual_seed(1)) * 2 - 1


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], Callable[[nn.Module], tuple[Any, ...]]]] = {
    "world model": (
        lambda: lively(**streams("audio"), width=64).requires_grad_().train(),
        world_loss,
        lambda network: draw(network, 8, batch=2),
    ),
    "image autoencoder": (lambda: ImageAutoencoder(**AUTOENCODER), image_loss, lambda network: (image(),)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_networks_learn_what_they_learn_on_the_cpu(
    gpu: torch.device, record: Record, name: str, compiled: bool
) -> None:
    make, loss_of, inputs_of = CASES[name]
    torch.manual_seed(0)
    reference = make()
    inputs = inputs_of(reference)
    expected = gradients(reference, loss_of(reference, *inputs))
    network = deepcopy(reference).to(gpu)
    network.zero_grad()
    if compiled:
        network.compile()
    exact = relative(gradients(network, loss_of(network, *on(gpu, *inputs))), expected)
    network.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        loss = loss_of(network, *on(gpu, *inputs))
    rounded = relative(gradients(network, loss), expected)
    assert exact < 1e-3
    assert rounded < 6e-2
    record(
        f"Gradients of the {name}, {'compiled' if compiled else 'eager'}, against float32 on the CPU",
        f"error in float32 {exact:.1e}, in bfloat16 {rounded:.1e}",
    )


def roll(engine: Engine, controls: Controls, context: Streams, frames: int) -> Tensor:
    known = context["video"].shape[1]
    assert engine.wait_compiled(len(controls.buttons)) == engine.compile
    engine.reset(context, Controls(controls.buttons[:, :known], controls.axes[:, :known]), seed=3)
    made = [engine.step(controls.buttons[:, t], controls.axes[:, t]) for t in range(known, known + frames)]
    return torch.stack([frame.latents["video"].float().cpu() for frame in made], 1)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_an_engine_makes_the_frames_that_it_makes_on_the_cpu(
    gpu: torch.device, record: Record, compiled: bool, guidance: float
) -> None:
    network = lively(sink=1, **streams("audio", "motion"))
    latents, _, controls = draw(network, 14, batch=2)
    context = {name: x[:, :4] for name, x in latents.items()}
    options: dict[str, Any] = {"noise_levels": (1.0, 0.6, 0.3), "guidance": guidance, "context_noise": 0.1}
    expected = roll(Engine(network, **options), controls, context, 10)
    found = roll(Engine(network, **options, compile=compiled, device=gpu), controls, context, 10)
    error = relative(found, expected)
    assert error < 1e-3
    record(
        f"Engine, {'compiled' if compiled else 'eager'}, guidance {guidance:g}, float32, 10 frames, against the CPU",
        f"error {error:.1e}",
    )


@pytest.mark.parametrize("quantization", ["fp8_weight_only", "fp8_dynamic"])
def test_an_engine_plays_in_eight_bits(gpu: torch.device, record: Record, quantization: Any) -> None:
    if refused := probe(quantization, gpu):
        record(f"Engine in {quantization}", f"refused: {refused}")
        return
    network = lively(width=64, depth=4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.5)
    latents, _, controls = draw(network, 8)
    context = {name: x[:, :2] for name, x in latents.items()}
    plain = roll(Engine(network, dtype=torch.bfloat16, device=gpu), controls, context, 6)
    eight = Engine(network, dtype=torch.bfloat16, device=gpu, quantization=quantization)
    error = relative(roll(eight, controls, context, 6), plain)
    assert error < 0.1
    record(f"Engine in {quantization}, 6 frames, against bfloat16", f"error {error:.1e}")


def test_batches_are_pinned_and_reach_the_gpu_unchanged(gpu: torch.device, record: Record, tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "data", episodes=8, frames=9, modalities=("rgb", "controls"))
    windows = WindowDataset(root, modalities=("rgb", "controls"), length=2)
    expected = list(ResumableLoader(windows, GlobalBatches(windows, 4), 0))
    moved = []
    for batch in ResumableLoader(windows, GlobalBatches(windows, 4), 2):
        assert all(tensor.is_pinned() for tensor in batch.values())
        moved.append({name: tensor.to(gpu, non_blocking=True) for name, tensor in batch.items()})
    for batch, wanted in zip(moved, expected, strict=True):
        for name, tensor in batch.items():
            assert torch.equal(tensor.cpu(), wanted[name])
    record("Loader: pinned batches, moved without waiting", f"{len(moved)} of {len(expected)} equal")
