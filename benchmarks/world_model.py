"""How much of the machine's matrix multiplication a training step of the world model turns into learning.

A step is forward, backward, clipping and optimiser of the recipe with teacher forcing, in what the machine multiplies
fast (bfloat16 or float32), compiled where the machine can. The baseline is the machine's own rate on the same matrices:
the linear layers of the blocks, alone.
Run with ``python -m benchmarks.world_model [--config configs/models/world_model_44m.yaml]``.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from owl.hardware import fast_dtype, multiplies_bfloat16
from owl.models.world_model import WorldTransformer
from owl.nn.placement import placement
from owl.optim import MuonAdamW
from owl.optim.configuration import parameter_groups
from owl.recipes.world_model import WorldModel

CONFIGS = Path(__file__).parent.parent / "configs" / "models"


def step(recipe: WorldModel, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, mixed: bool) -> None:
    """One step of training, under bfloat16 autocast or in float32."""
    device = batch["latent"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=mixed):
        loss = recipe.training_step(batch, 0)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(recipe.network.parameters(), 1.0)
    optimizer.step()


def matmul_rate(network: WorldTransformer, tokens: int, rounds: int) -> float:
    """FLOP/s of the blocks' linear layers, forward and both backward products, on as many tokens as a step has."""
    width = network.width
    hidden = network.blocks[0].up.out_features
    shapes = [(width, 3 * width), (width, width), (width, hidden), (hidden, width)]
    device = placement(network).device
    operands = [
        [torch.randn(*size, device=device, dtype=fast_dtype(device)) for size in ((tokens, a), (a, b), (tokens, b))]
        for a, b in shapes
    ]
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for x, weight, gradient in operands:
            x @ weight, gradient @ weight.T, x.T @ gradient
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sum(6 * tokens * a * b for a, b in shapes) / statistics.median(times)


def main() -> None:
    """Print both rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config", type=Path, nargs="*", default=[CONFIGS / f"world_model_{n}.yaml" for n in ("96x160", "44m")]
    )
    parser.add_argument("--frames", type=int, default=10, help="frames in a clip")
    parser.add_argument("--batch", type=int, default=4, help="clips in a batch")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mixed = multiplies_bfloat16(device)
    for config in options.config:
        torch.manual_seed(0)
        network = WorldTransformer(**yaml.safe_load(config.read_text())["init_args"]).to(device)
        recipe = WorldModel(network)
        recipe.log = recipe.log_dict = lambda *arguments, **settings: None  # there is no trainer to log to
        batch = {
            "window": torch.arange(options.batch),
            "latent": torch.randn(options.batch, options.frames, *network.streams["video"].shape, device=device),
            "buttons": torch.zeros(options.batch, options.frames, len(network.buttons), device=device),
            "axes": torch.zeros(options.batch, options.frames, len(network.axes), device=device),
        }
        optimizer = MuonAdamW(parameter_groups(network))
        with FlopCounterMode(display=False) as counter:  # before anything is compiled: what is fused is not counted
            step(recipe, batch, optimizer, mixed)
        for block in network.blocks:
            block.compile()
        tokens = 2 * options.batch * options.frames * network.tokens
        times, rates = [], []
        for _ in range(2):
            step(recipe, batch, optimizer, mixed)
        for _ in range(options.rounds):
            start = time.perf_counter()
            step(recipe, batch, optimizer, mixed)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            rates.append(matmul_rate(network, tokens, 1))
        flops, seconds, machine = counter.get_total_flops(), statistics.median(times), statistics.median(rates)
        print(
            f"{config.stem}: {seconds * 1e3:.0f} ms a step of {options.batch} clips of {options.frames} frames, "
            f"{flops / 1e9:.0f} GFLOP\n"
            f"  training step                     {flops / seconds / 1e9:6.0f} GFLOP/s\n"
            f"  its matrix multiplications alone  {machine / 1e9:6.0f} GFLOP/s   baseline\n"
            f"  ratio                             {flops / seconds / machine:6.2f}"
        )


if __name__ == "__main__":
    main()
