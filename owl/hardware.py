"""Decide whether bfloat16 or float32 is faster on a device.

A CPU without bfloat16 units multiplies bfloat16 up to a hundred times more slowly than float32. Model names and CPU
flags are not reliable, so the speed is measured. ``ONEDNN_MAX_CPU_ISA=AVX2`` (a variable of oneDNN, read when torch is
loaded) disables the units for a process, for tests and benchmarks.
"""

import functools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

SIDE = 256
"""Size of the square matrices; large enough to be compute-bound, small enough for a fraction of a millisecond."""
CHANNELS, PICTURE = 64, 16
"""Size of the 3x3 convolution over a square image."""
FLOPS = 2 * SIDE**3 + 2 * 9 * (CHANNELS * PICTURE) ** 2
ROUNDS, SHORTEST, PATIENCE = 20, 3, 0.1
"""Maximum number of rounds, minimum number of rounds, and seconds of CPU time after which the measurement ends."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""By their names on the command line."""


def default_device() -> torch.device:
    """Return the current GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or "the CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def leave_a_core() -> None:
    """Let torch use one core less than this process may use, at least one; ``OMP_NUM_THREADS`` overrides it.

    For programs beside which another works all the time, such as the browser that shows their frames. On all cores, a
    thread of torch that has to wait for the browser makes the others wait at the end of every operator.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) - 1)))


@dataclass(frozen=True)
class Rates:
    """FLOP/s of matrix products and convolutions on one core of this machine's CPU."""

    bfloat16: float
    float32: float


@functools.cache
def cpu_rates() -> Rates:
    """Measure both once per process, which takes a few hundredths of a second.

    The best of several short rounds is used, in CPU time of one thread, which does not run while other processes do.
    The ratio is therefore the same on a busy machine.
    """
    best = {torch.bfloat16: math.inf, torch.float32: math.inf}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            works = {dtype: _work(dtype) for dtype in best}
            start = time.thread_time()  # not of the clock, which would leave a busy machine the fewest rounds
            for number in range(ROUNDS + 1):
                for dtype, work in works.items():
                    before = time.thread_time()
                    work()
                    if number:  # the first call selects kernels
                        best[dtype] = min(best[dtype], time.thread_time() - before)
                if number >= SHORTEST and time.thread_time() - start > PATIENCE:
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
    """Return whether matrix products and convolutions are faster in bfloat16 than in float32.

    CPUs are measured, GPUs report it; other devices are assumed to be slow.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and cpu_rates().bfloat16 > cpu_rates().float32


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """Return torch.bfloat16 if it is faster than float32 on the device, else torch.float32."""
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def trainer_precision(device: torch.device | str) -> Literal["bf16-mixed", "32-true"]:
    """Return the precision that ``trainer.precision: auto`` selects on a device.

    In Python: ``Trainer(accelerator="cpu", precision=trainer_precision("cpu"))``.
    """
    return "bf16-mixed" if multiplies_bfloat16(device) else "32-true"


def cost_of_bfloat16(device: torch.device | str) -> str | None:
    """Describe the cost of bfloat16 on a device in a clause; None if it is fast."""
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
