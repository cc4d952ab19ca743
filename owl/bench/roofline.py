"""Estimate the minimum time of a computation on a device from its operators (roofline model)."""

import functools
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from owl.hardware import multiplies_bfloat16
from owl.precision.probe import MULTIPLE

Precision = Literal["fp32", "bf16", "fp8"]

aten = torch.ops.aten
LINEAR = (aten.mm, aten.addmm)
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
SECONDS_OF_RATE = 0.5  # minimum duration of the measurement of a rate, which also takes at least three rounds
COPIED = 2**28  # bytes: larger than every cache


class Device(NamedTuple):
    """Peak rates of a device.

    Attributes:
        rates: FLOP/s of matrix products by precision.
        bandwidth: Bytes/s between memory and processor, reads plus writes.
    """

    rates: dict[Precision, float]
    bandwidth: float


# Dense rates, accumulated in float32 as PyTorch does. fp32 is without TF32, which PyTorch leaves off by default.
# RTX 5090: NVIDIA RTX Blackwell GPU Architecture, appendix A. Rates with float16 accumulation are twice as high.
# H100 SXM5 and H200 SXM: NVIDIA's data sheets of these Tensor Core GPUs, which list twice these rates "with sparsity".
DATA_SHEETS = {
    "rtx5090": Device({"fp32": 104.8e12, "bf16": 209.5e12, "fp8": 419.0e12}, 1.792e12),
    "h100": Device({"fp32": 66.9e12, "bf16": 989.4e12, "fp8": 1978.9e12}, 3.35e12),
    "h200": Device({"fp32": 66.9e12, "bf16": 989.4e12, "fp8": 1978.9e12}, 4.8e12),
}
SOLD_AS = {"rtx5090": "RTX 5090", "h100": "H100", "h200": "H200"}
"""Substrings of the name that the driver reports."""


class Operator(NamedTuple):
    """One call of an operator.

    Attributes:
        flops: FLOPs of matrix products, convolutions and attention; 0 for all others.
        read: Bytes of the operands.
        written: Bytes of the results.
        precision: Precision of the operands.
        linear: Whether it is the product of a linear layer that float8 training would convert.
        optimizer: Whether it belongs to the optimiser.
    """

    flops: int
    read: int
    written: int
    precision: Precision
    linear: bool
    optimizer: bool


class Operators(FlopCounterMode):
    """Count every operator executed in this context, including backward passes. Run compiled code eagerly meanwhile.

    Extends PyTorch's counter with the bytes that operators read and write, and with the attention kernel of CPUs. Views
    read and write nothing.

    Attributes:
        calls: Number of calls of each operator with operands of these sizes; accumulated over several uses.
        optimizer: Set while the optimiser steps.
    """

    def __init__(self) -> None:
        attention = {
            aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
        }
        super().__init__(display=False, custom_mapping=attention)
        self.calls: Counter[Operator] = Counter()
        self.optimizer = False

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        flops = (
            self.flop_registry[func_packet](*args, **kwargs, out_val=out) if func_packet in self.flop_registry else 0
        )
        operands, results = list(_tensors((args, kwargs))), list(_tensors(out))
        name = func_packet.__name__
        if name.endswith("_"):  # in place
            results = list(_tensors(args[:1]))
        elif name in ALLOCATIONS or _is_view(operands, results):
            operands = results = []
        if flops or operands or results:
            sides = [side for operand in operands[-2:] for side in operand.shape]
            linear = func_packet in LINEAR and not self.optimizer and all(side % MULTIPLE == 0 for side in sides)
            read, written = sum(map(_size, operands)), sum(map(_size, results))
            self.calls[Operator(flops, read, written, _precision(operands), linear, self.optimizer)] += 1
        return out


def total_flops(calls: Mapping[Operator, float], optimizer: bool = False) -> float:
    """Return the FLOPs of everything except the optimiser, or of the optimiser."""
    return sum(call.flops * count for call, count in calls.items() if call.optimizer == optimizer)


def predict(calls: Mapping[Operator, float], device: Device, fp8: bool = False) -> tuple[float, float]:
    """Return bounds of the time of operators by the roofline model, in seconds.

    An operator takes flops / rate or bytes / bandwidth, whichever is more; its operands (weights, activations,
    gradients) are read once and its results written once. The lower bound includes only matrix products, convolutions
    and attention, as if everything else were fused into them, and all operators of the optimiser. The upper bound
    includes every operator, without fusion. Both are optimistic: kernels do not reach the rate of a data sheet, and the
    time of kernel launches, which dominates small networks on GPUs, is ignored.

    Args:
        calls: Executed operators, from `Operators`.
        device: Rates of the device.
        fp8: Whether linear layers run in float8: at its rate, with operands of half the size, without casts.

    Returns:
        The lower and the upper bound.
    """
    fused = unfused = 0.0
    for call, count in calls.items():
        converted = fp8 and call.linear
        rate = device.rates.get("fp8" if converted else call.precision, device.rates["bf16"])
        moved = (call.read // 2 if converted else call.read) + call.written
        seconds = count * max(call.flops / rate, moved / device.bandwidth)
        unfused += seconds
        if call.flops or call.optimizer:
            fused += seconds
    return fused, unfused


@functools.cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product, the best of several rounds, since other load only adds time.

    Args:
        device: "cpu" or "cuda".
        dtype: Type of the matrices.
    """
    side = 2048 if device == "cpu" else 8192
    if dtype == torch.bfloat16 and not multiplies_bfloat16(device):
        side //= 4  # larger ones would take minutes
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    return 2 * side**3 / min(_rounds(lambda: a @ b, device))


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Return the bytes/s of a large copy, reads plus writes, the best of several rounds."""
    a = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * COPIED / min(_rounds(lambda: b.copy_(a), device))


def find_device(name: str) -> Device:
    """Return a device of `DATA_SHEETS`, or measure "cpu"."""
    if name != "cpu":
        return DATA_SHEETS[name]
    rates: dict[Precision, float] = {
        "fp32": matmul_rate("cpu", torch.float32),
        "bf16": matmul_rate("cpu", torch.bfloat16),
    }
    return Device(rates, copy_bandwidth("cpu"))


def data_sheet_of(driver_name: str) -> Device | None:
    """Return the data sheet for a driver's device name such as "NVIDIA H100 80GB HBM3", or None."""
    return next((DATA_SHEETS[name] for name, words in SOLD_AS.items() if words in driver_name), None)


def synchronize(device: str) -> None:
    """Wait until the device has completed all queued work."""
    if device == "cuda":
        torch.cuda.synchronize()


def _rounds(work: Any, device: str) -> list[float]:
    times: list[float] = []
    work()
    while len(times) < 3 or sum(times) < SECONDS_OF_RATE:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield getattr(values, "_local_tensor", values)  # the local shard of a DTensor
    elif isinstance(values, list | tuple | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


def _is_view(operands: list[Tensor], results: list[Tensor]) -> bool:
    memory = {_place(operand) for operand in operands}
    return bool(results) and all(_place(result) in memory for result in results)


def _place(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # wrapper tensors, such as those of float8, have no storage
        return id(tensor)


def _size(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())  # less if it is expanded


def _precision(operands: list[Tensor]) -> Precision:
    size = next((operand.element_size() for operand in operands if operand.is_floating_point()), 4)
    return "fp32" if size >= 4 else "bf16" if size == 2 else "fp8"


def _attention_flops(query: Any, key: Any, value: Any, *others: Any, **named: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *others: Any, **named: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))
