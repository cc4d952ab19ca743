"""Result of a benchmark, and measurements shared by training and inference."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from owl.bench.roofline import Operator, Precision

PROFILED = 3
"""Steps, frames or calls in a kernel table or a trace."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Measurement:
    """Result of measuring one target.

    Attributes:
        kind: "training", "autoencoder", "decoder", "audio autoencoder", "audio decoder", "world model" or "inverse
            dynamics model".
        unit: Unit of `operators`: "step", "image", "frame", "clip" or "second_of_sound".
        device: "cpu" or "cuda".
        precision: "fp32" or "bf16".
        compiled: Whether torch.compile was used.
        metrics: Values by name.
        operators: Number of calls of each operator in one unit.
        kernels: The most expensive ones of `PROFILED` units: name, calls, milliseconds, share.
    """

    kind: str
    unit: str
    device: str
    precision: Precision
    compiled: bool
    metrics: dict[str, float]
    operators: Mapping[Operator, float] = field(default_factory=dict)
    kernels: list[dict[str, Any]] = field(default_factory=list)


def reset_peak_memory(device: str) -> None:
    """Reset the peak of the used memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        CLEAR.write_text("5", "utf-8")  # man 5 proc: resets the peak of the resident set


def peak_memory(device: str) -> float:
    """Return the peak memory in MiB since `reset_peak_memory`: allocated by torch on a GPU, otherwise resident memory.

    On systems other than Linux, the peak since the start of the process is returned.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if STATUS.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text("utf-8", "replace"))):
        return int(found[1]) / 1024
    import resource  # not available on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def start_profiler(device: str) -> profile:
    """Start recording every kernel."""
    profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda"))
    profiler.start()
    return profiler


def most_expensive(profiler: profile, count: int, device: str) -> list[dict[str, Any]]:
    """Return the kernels (on CPUs: operators) with the largest self time, most expensive first."""
    attribute = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"  # microseconds
    rows = sorted(((getattr(row, attribute), row) for row in profiler.key_averages()), key=lambda row: -row[0])
    total = sum(microseconds for microseconds, _ in rows) or 1.0
    return [
        {
            "name": row.key,
            "calls": row.count,
            "milliseconds": round(microseconds / 1e3, 3),
            "share": round(microseconds / total, 4),
        }
        for microseconds, row in rows[:count]
    ]
