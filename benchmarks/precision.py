"""What bfloat16 gains or costs: training steps and an engine's frame, on this CPU as it is and without bfloat16 units.

The baseline is float32. Units are taken away from a second process by oneDNN's ``ONEDNN_MAX_CPU_ISA=AVX2``, which
leaves it the instructions of most laptops. Networks are those of the quickstarts, uncompiled, on synthetic data; Muon
iterates in what is fast in either case. Run with ``python -m benchmarks.precision [--seconds 5]``.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from benchmarks import trainer, world_model
from owl.flow_matching import noise_levels
from owl.hardware import cpu_rates, trainer_precision
from owl.models.world_model import WorldTransformer
from owl.optim import MuonAdamW
from owl.optim.configuration import parameter_groups
from owl.recipes.world_model import WorldModel
from owl.rollout.engine import Engine

CONFIG = Path(__file__).parent.parent / "configs" / "models" / "world_model_96x160.yaml"
MACHINES = {"as it is": {}, "without bfloat16 units": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}
CLIPS, FRAMES, SIZE = 1, 10, (96, 160)


def quickstart(mixed: bool) -> Callable[[], None]:
    """A training step of the image VAE on 16 pictures."""
    step = trainer.bare_step()
    batch = {"rgb": torch.randint(256, (16, 1, 3, *SIZE), dtype=torch.uint8)}
    return lambda: step(batch, mixed)


def world(mixed: bool) -> Callable[[], None]:
    """A training step of the world model on one clip of ten frames."""
    network = WorldTransformer(**yaml.safe_load(CONFIG.read_text())["init_args"])
    recipe = WorldModel(network)
    recipe.log = recipe.log_dict = lambda *arguments, **settings: None  # there is no trainer to log to
    batch = {
        "window": torch.arange(CLIPS),
        "latent": torch.randn(CLIPS, FRAMES, *network.streams["video"].shape),
        "buttons": torch.zeros(CLIPS, FRAMES, len(network.buttons)),
        "axes": torch.zeros(CLIPS, FRAMES, len(network.axes)),
    }
    optimizer = MuonAdamW(parameter_groups(network))
    return lambda: world_model.step(recipe, batch, optimizer, mixed)


def frame(half: bool) -> Callable[[], None]:
    """A frame of the engine, four steps each."""
    network = WorldTransformer(**yaml.safe_load(CONFIG.read_text())["init_args"])
    engine = Engine(network, noise_levels=noise_levels(4), dtype=torch.bfloat16 if half else torch.float32)
    engine.reset()
    controls = (torch.zeros(1, len(network.buttons)), torch.zeros(1, len(network.axes)))
    return lambda: engine.step(*controls) and None


WORK = {"quickstart, a step": quickstart, "world model, a step": world, "engine, a frame": frame}


def seconds(work: Callable[[], None], patience: float) -> float:
    """The median of rounds after a first one, or that one alone where it takes longer than all are meant to."""
    times: list[float] = []
    while not times or sum(times) < patience:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


def measure(patience: float) -> None:
    """Print this process's table."""
    rates = cpu_rates()
    print(
        f"  one core: {rates.bfloat16 / 1e9:.3g} GFLOP/s in bfloat16, {rates.float32 / 1e9:.3g} in float32; "
        f"precision auto is {trainer_precision('cpu')}",
        flush=True,
    )
    for name, make in WORK.items():
        torch.manual_seed(0)
        exact = seconds(make(False), patience)
        half = seconds(make(True), patience)
        print(
            f"  {name:20} float32 {exact * 1e3:9.1f} ms baseline   bfloat16 {half * 1e3:9.1f} ms {exact / half:6.2f}x",
            flush=True,
        )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="to measure each for, at least once")
    parser.add_argument("--here", action="store_true", help="only this process, as it was started")
    options = parser.parse_args()
    if options.here:
        return measure(options.seconds)
    command = [sys.executable, "-m", "benchmarks.precision", "--here", "--seconds", str(options.seconds)]
    for name, variables in MACHINES.items():
        print(f"this CPU {name}:", flush=True)
        subprocess.run(command, env=os.environ | variables, check=True)


if __name__ == "__main__":
    main()
