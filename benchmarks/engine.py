"""Frames/s of the streaming engine against a straightforward one, and against the machine's matrix multiplication.

The baseline is what one writes first: eager, two passes per frame (denoise, then commit), and a cache that grows by
``torch.cat`` and is cut to the window. Both run the same weights, one denoising step per frame, in what the
machine multiplies fast: bfloat16 or float32.
Run with ``python -m benchmarks.engine [--frames 60] [--long]``.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from owl.hardware import fast_dtype
from owl.models.world_model import Controls, WorldTransformer
from owl.nn.rope import rope
from owl.rollout.engine import Engine

CONFIG = Path(__file__).parent.parent / "configs" / "models" / "world_model_44m.yaml"
LONG = (100, 10_000)


class PlainEngine:
    """The baseline."""

    def __init__(self, network: WorldTransformer) -> None:
        self.network, self.time = network, 0
        self.caches: list[tuple[Tensor, Tensor] | None] = [None] * len(network.windows)
        self.pending: Tensor | None = None

    def attend(self, layer: int, commit: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cached = self.caches[layer]
            if cached is not None:
                key, value = torch.cat([cached[0], key], 2), torch.cat([cached[1], value], 2)
            if commit:
                kept = self.network.windows[layer] * self.network.tokens
                self.caches[layer] = (key[:, :, -kept:], value[:, :, -kept:])
            return torch.nn.functional.scaled_dot_product_attention(query, key, value)

        return attention

    def velocity(self, x: Tensor, level: float, controls: Controls, commit: bool) -> Tensor:
        network = self.network
        levels = torch.full((len(x), 1), level)
        condition = torch.nn.functional.silu(
            network.level(levels) + network.controls(controls.buttons, controls.axes, controls.known)
        )
        rows, columns = network._positions(x.device)
        turns = rope(torch.tensor([[self.time]]), rows, columns, network.width // network.heads)
        tokens = network.embed({"video": x})
        for layer, block in enumerate(network.blocks):
            tokens = block(tokens, condition, turns, self.attend(layer, commit))
        return network.unembed(tokens, condition)["video"]

    @torch.no_grad()
    def step(self, buttons: Tensor, axes: Tensor) -> Tensor:
        controls = Controls(buttons[:, None], axes[:, None])
        noise = torch.randn(len(buttons), 1, *self.network.streams["video"].shape, dtype=buttons.dtype)
        clean = noise - self.velocity(noise, 1.0, controls, commit=False)
        self.velocity(clean, 0.0, controls, commit=True)
        self.time += 1
        return clean


def matmul_rate(dtype: torch.dtype, rounds: int = 20) -> float:
    """FLOP/s of a large matrix multiplication, the median of some rounds."""
    a, b = torch.randn(2, 2048, 2048, dtype=dtype)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / statistics.median(times)


def flops_per_frame(network: WorldTransformer) -> int:
    """Operations of one frame: of the pass that commits one frame and denoises the next, with a full cache."""
    engine = Engine(network, noise_levels=(1.0,))
    engine.reset()
    buttons, axes = torch.zeros(1, len(network.buttons)), torch.zeros(1, len(network.axes))
    engine.step(buttons, axes)
    with FlopCounterMode(display=False) as counter:
        engine.step(buttons, axes)
    return counter.get_total_flops()


def seconds(step: Callable[[Tensor, Tensor], object], controls: tuple[Tensor, Tensor]) -> float:
    """Time of one frame."""
    start = time.perf_counter()
    step(*controls)
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG, help="a world model's class_path and init_args")
    parser.add_argument("--frames", type=int, default=60, help="frames of each, in turns")
    parser.add_argument("--long", action="store_true", help=f"also compare frame {LONG[1]} with frame {LONG[0]}")
    options = parser.parse_args()
    torch.manual_seed(0)
    init_args = yaml.safe_load(options.config.read_text())["init_args"]
    network = WorldTransformer(**(init_args | {"global_every": 0})).eval()  # one window, as the baseline has it
    for parameter in network.parameters():  # the layers that start as zeros would make all frames alike
        torch.nn.init.normal_(parameter, std=0.02)
    flops = flops_per_frame(network)
    dtype = fast_dtype("cpu")
    network = network.to(dtype)
    engine = Engine(network, noise_levels=(1.0,), compile=True)
    engine.reset()
    engine.wait_compiled()
    plain = PlainEngine(network)
    controls = (
        torch.zeros(1, len(network.buttons), dtype=dtype),
        torch.zeros(1, len(network.axes), dtype=dtype),
    )
    warm_up = max(network.windows) + 3
    for _ in range(warm_up):
        engine.step(*controls)
        plain.step(*controls)
    times = [(seconds(engine.step, controls), seconds(plain.step, controls)) for _ in range(options.frames)]
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    rate = flops / ours
    machine = matmul_rate(dtype)
    parameters = sum(p.numel() for p in network.parameters())
    print(f"{options.config.stem}: {parameters / 1e6:.1f} M parameters, {network.tokens} tokens per frame")
    print(f"plain engine, eager, two passes, torch.cat  {1 / theirs:6.2f} frames/s   {theirs * 1e3:6.1f} ms   baseline")
    ratio = f"{theirs / ours:.2f}x"
    print(f"owl's engine, compiled, one pass            {1 / ours:6.2f} frames/s   {ours * 1e3:6.1f} ms   {ratio}")
    print(
        f"{flops / 1e9:.2f} GFLOP a frame at {rate / 1e9:.0f} GFLOP/s: {rate / machine:.2f} of the machine's "
        f"{dtype} matrix multiplication ({machine / 1e9:.0f} GFLOP/s)"
    )
    if options.long:
        while engine.time < LONG[1]:
            engine.step(*controls)
        young = Engine(network, noise_levels=(1.0,), compile=True)
        young.reset()
        young.wait_compiled()
        while young.time < LONG[0]:
            young.step(*controls)
        pairs = [(seconds(engine.step, controls), seconds(young.step, controls)) for _ in range(200)]  # in turns
        last, first = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"frame {LONG[1]} takes {last / first:.2f} of the time of frame {LONG[0]}")


if __name__ == "__main__":
    main()
