"""What a computation takes at best: its operators, counted, at the speed of a device."""

import functools
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from owl.hardware import multiplies_bfloat16

Precision = Literal["fp32", "bf16", "fp8"]

aten = torch.ops.aten
LINEAR = (aten.mm, aten.addmm)
FP8_MULTIPLE = 16  # float8 matrix products need sides that are multiples of it
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
SECONDS_OF_RATE = 0.5  # at least this long, or three rounds, for each rate that is measured
COPIED = 2**28  # bytes: beyond every cache


class Device(NamedTuple):
    """How fast a device is.

    Attributes:
        rates: FLOP/s of matrix products by precision.
        bandwidth: Bytes/s between memory and processor, reading and writing together.
    """

    rates: dict[Precision, float]
    bandwidth: float


# Dense rates, accumulated in float32 as PyTorch does. fp32 is without TF32, which PyTorch leaves off by default.
# RTX 5090: NVIDIA RTX Blackwell GPU Architecture, appendix A. Its rates with sums in float16 are twice as high.
# H100 SXM5 and H200 SXM: NVIDIA's data sheets of these Tensor Core GPUs, whose rates "with sparsity" are twice these.
DATA_SHEETS = {
    "rtx5090": Device({"fp32": 104.8e12, "bf16": 209.5e12, "fp8": 419.0e12}, 1.792e12),
    "h100": Device({"fp32": 66.9e12, "bf16": 989.4e12, "fp8": 1978.9e12}, 3.35e12),
    "h200": Device({"fp32": 66.9e12, "bf16": 989.4e12, "fp8": 1978.9e12}, 4.8e12),
}
SOLD_AS = {"rtx5090": "RTX 5090", "h100": "H100", "h200": "H200"}
"""What the driver's name of a device contains."""


class Operator(NamedTuple):
    """One call of an operator.

    Attributes:
        flops: Of matrix products, convolutions and attention; 0 for all others.
        read: Bytes of its operands.
        written: Bytes of its results.
        precision: Of its operands.
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
    """Counts every operator that is executed within it, backward passes included. Leave compiled code eager meanwhile.

    PyTorch's counter, which also notes the bytes that operators touch, and knows the attention kernel of CPUs. Views
    touch nothing.

    Attributes:
        calls: How often each operator was called with operands of these sizes; kept from one use to the next.
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
            linear = func_packet in LINEAR and not self.optimizer and all(side % FP8_MULTIPLE == 0 for side in sides)
            read, written = sum(map(_size, operands)), sum(map(_size, results))
            self.calls[Operator(flops, read, written, _precision(operands), linear, self.optimizer)] += 1
        return out


def total_flops(calls: Counter[Operator], optimizer: bool = False) -> int:
    """FLOPs of everything but the optimiser, or of the optimiser."""
    return sum(call.flops * count for call, count in calls.items() if call.optimizer == optimizer)


def predict(calls: Counter[Operator], device: Device, fp8: bool = False) -> tuple[float, float]:
    """Seconds that operators take by the roofline model, between which a good implementation should lie.

    An operator takes flops / rate or bytes / bandwidth, whichever is more; its operands (weights, activations,
    gradients) are read once and its results written once. The lower number is that of matrix products, convolutions and
    attention alone, as if everything else were fused into them; only of the optimiser all operators count. For the
    upper one every operator counts, nothing being fused. No kernel reaches the rate of a data sheet, and the time to
    launch kernels is left out, which on GPUs rules small networks: both make what happens slower than predicted.

    Args:
        calls: What is executed, from `Operators`.
        device: Where.
        fp8: Whether linear layers run in float8: at its rate, with operands of half the size, casts not counted.

    Returns:
        The lower and the upper number.
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
    """FLOP/s of a large matrix product here, the best of some rounds: other work on the machine only ever adds time.

    Args:
        device: "cpu" or "cuda".
        dtype: Of the matrices.
    """
    side = 2048 if device == "cpu" else 8192
    if dtype == torch.bfloat16 and not multiplies_bfloat16(device):
        side //= 4  # large ones would take minutes
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    return 2 * side**3 / min(_rounds(lambda: a @ b, device))


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes/s of a large copy here, those read and those written, the best of some rounds."""
    a = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * COPIED / min(_rounds(lambda: b.copy_(a), device))


def find_device(name: str) -> Device:
    """A device of `DATA_SHEETS`, or "cpu", which is measured."""
    if name != "cpu":
        return DATA_SHEETS[name]
    rates: dict[Precision, float] = {
        "fp32": matmul_rate("cpu", torch.float32),
        "bf16": matmul_rate("cpu", torch.bfloat16),
    }
    return Device(rates, copy_bandwidth("cpu"))


def data_sheet_of(driver_name: str) -> Device | None:
    """The data sheet of a device as its driver names it, such as "NVIDIA H100 80GB HBM3", where there is one."""
    return next((DATA_SHEETS[name] for name, words in SOLD_AS.items() if words in driver_name), None)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
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
        yield getattr(values, "_local_tensor", values)  # of a DTensor what lies in this process
    elif isinstance(values, list | tuple | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


def _is_view(operands: list[Tensor], results: list[Tensor]) -> bool:
    memory = {_place(operand) for operand in operands}
    return bool(results) and all(_place(result) in memory for result in results)


def _place(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # tensors that wrap others, such as those of float8, have no memory of their own
        return id(tensor)


def _size(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())  # less where it is expanded


def _precision(operands: list[Tensor]) -> Precision:
    size = next((operand.element_size() for operand in operands if operand.is_floating_point()), 4)
    return "fp32" if size >= 4 else "bf16" if size == 2 else "fp8"


def _attention_flops(query: Any, key: Any, value: Any, *others: Any, **named: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *others: Any, **named: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))
