"""What a device multiplies fast: asked wherever bfloat16 or float32 is chosen.

A CPU without units for bfloat16 multiplies it up to a hundred times more slowly than float32. Which CPUs have them no
list of names or flags tells reliably, so it is measured. ``ONEDNN_MAX_CPU_ISA=AVX2`` (a variable of oneDNN, read when
torch is loaded) takes the units away from a process: for tests and benchmarks.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

SIDE = 256
"""Of the square matrices; large enough to be limited by arithmetic, small enough for a fraction of a millisecond."""
CHANNELS, PICTURE = 64, 16
"""Of the convolution, 3x3, over a square picture."""
FLOPS = 2 * SIDE**3 + 2 * 9 * (CHANNELS * PICTURE) ** 2
ROUNDS, SHORTEST, PATIENCE = 20, 3, 0.1
"""How often both are measured, and after how many rounds that ends at this many seconds."""


@dataclass(frozen=True)
class Rates:
    """FLOP/s of matrix products and convolutions on one core of this machine's CPU."""

    bfloat16: float
    float32: float


@functools.cache
def cpu_rates() -> Rates:
    """Measure both once in this process, which takes a few hundredths of a second.

    Other work on the machine only ever adds time, so that the best of short rounds counts, and that of one thread:
    threads wait for each other, and each of them can be held up. So the ratio is the same on a machine that is busy.
    """
    best = {torch.bfloat16: math.inf, torch.float32: math.inf}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            works = {dtype: _work(dtype) for dtype in best}
            start = time.perf_counter()
            for number in range(ROUNDS + 1):
                for dtype, work in works.items():
                    before = time.perf_counter()
                    work()
                    if number:  # the first chooses kernels
                        best[dtype] = min(best[dtype], time.perf_counter() - before)
                if number >= SHORTEST and time.perf_counter() - start > PATIENCE:
                    break
    finally:
        torch.set_num_threads(threads)
    return Rates(*(FLOPS / seconds for seconds in best.values()))


def _work(dtype: torch.dtype) -> Callable[[], None]:
    matrix = torch.ones(SIDE, SIDE, dtype=dtype, device="cpu")
    picture = torch.ones(1, CHANNELS, PICTURE, PICTURE, dtype=dtype, device="cpu")
    kernel = torch.ones(CHANNELS, CHANNELS, 3, 3, dtype=dtype, device="cpu")

    def run() -> None:
        torch.mm(matrix, matrix)
        F.conv2d(picture, kernel, padding=1)

    return run


def multiplies_bfloat16(device: torch.device | str) -> bool:
    """Whether matrix products and convolutions are faster in bfloat16 than in float32.

    CPUs are measured, GPUs say it; other devices count as slow, since nothing is known of them.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and cpu_rates().bfloat16 > cpu_rates().float32


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """torch.bfloat16 where that multiplies faster than float32 does, else torch.float32."""
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def trainer_precision(device: torch.device | str) -> Literal["bf16-mixed", "32-true"]:
    """What ``trainer.precision: auto`` stands for on a device.

    In Python: ``Trainer(accelerator="cpu", precision=trainer_precision("cpu"))``.
    """
    return "bf16-mixed" if multiplies_bfloat16(device) else "32-true"


def cost_of_bfloat16(device: torch.device | str) -> str | None:
    """Say in a clause what bfloat16 costs on a device, None where it is fast."""
    if multiplies_bfloat16(device):
        return None
    kind = torch.device(device).type
    if kind != "cpu":
        return f"bfloat16 has no fast kernels on this {kind} device"
    rates = cpu_rates()
    return (
        f"bfloat16 products run at {rates.bfloat16 / 1e9:.3g} GFLOP/s here, float32 at {rates.float32 / 1e9:.3g} "
        "(measured on one core)"
    )
