"""Counted operations and bytes are those of the arithmetic, predictions those of the roofline."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from owl.bench.roofline import DATA_SHEETS, Device, Operator, Operators, data_sheet_of, predict, total_flops

MATMUL = 2 * 32 * 48 * 64


def counted(*tensors: torch.Tensor) -> list[Operator]:
    """The operators of one product."""
    with Operators() as operators:
        tensors[0] @ tensors[1]
    return list(operators.calls)


def test_a_matrix_product_reads_its_operands_and_writes_its_result() -> None:
    a, b = torch.randn(32, 48), torch.randn(48, 64)
    read, written = 4 * (32 * 48 + 48 * 64), 4 * 32 * 64
    assert counted(a, b) == [Operator(MATMUL, read, written, "fp32", True, False)]
    (half,) = counted(a.bfloat16(), b.bfloat16())
    assert half == Operator(MATMUL, read // 2, written // 2, "bf16", True, False)
    (odd,) = counted(a[:31], b)
    assert not odd.linear  # float8 products need multiples of 16
    (repeated,) = counted(a, torch.randn(48, 1).expand(48, 64))
    assert repeated.read == 4 * (32 * 48 + 48)


def test_views_and_allocations_touch_nothing_and_what_is_in_place_is_written() -> None:
    a = torch.randn(32, 48)
    with Operators() as operators:
        a.T.reshape(-1).view(48, 32)[3:].unsqueeze(0)  # reshape copies, the others do not
        torch.empty_like(a)
        a.add_(1)
    size = 4 * 32 * 48
    assert operators.calls == Counter({Operator(0, size, size, "fp32", False, False): 2})


def test_backward_passes_and_attention_on_cpus_are_counted() -> None:
    layer, x = nn.Linear(48, 64, bias=False), torch.randn(32, 48, requires_grad=True)
    with Operators() as operators:
        layer(x).sum().backward()
    assert total_flops(operators.calls) == 3 * MATMUL
    query = torch.randn(2, 4, 10, 16, requires_grad=True)
    with Operators() as operators:
        attended = F.scaled_dot_product_attention(query, query, query)
    forward = 2 * 2 * (2 * 4) * 10 * 10 * 16
    assert total_flops(operators.calls) == forward
    with Operators() as operators:
        attended.sum().backward()
    assert total_flops(operators.calls) == 5 / 2 * forward  # the scores once more, and two products for each of two


def test_a_prediction_takes_the_slower_of_arithmetic_and_memory() -> None:
    device = Device({"fp32": 50.0, "bf16": 100.0, "fp8": 200.0}, 10.0)
    slow_memory = Operator(100, 40, 40, "bf16", True, False)  # 1 s of arithmetic, 8 s of memory
    slow_arithmetic = Operator(1000, 4, 2, "fp32", False, False)  # 20 s, 0.6 s
    elementwise = Operator(0, 5, 5, "fp32", False, False)  # 1 s of memory
    optimizer = Operator(0, 10, 10, "fp32", False, True)  # 2 s
    calls = Counter({slow_memory: 2, slow_arithmetic: 1, elementwise: 3, optimizer: 1})
    assert predict(calls, device) == pytest.approx((16 + 20 + 2, 16 + 20 + 2 + 3))
    assert predict(calls, device, fp8=True)[0] == pytest.approx(2 * 6 + 20 + 2)  # half of what is read
    (fast,) = [Operator(1000, 4, 2, "bf16", True, False)]
    assert predict(Counter({fast: 1}), device, fp8=True)[0] == pytest.approx(5)
    assert predict(Counter({fast: 1}), device)[0] == pytest.approx(10)


def test_data_sheets_are_found_by_the_drivers_names() -> None:
    assert data_sheet_of("NVIDIA H100 80GB HBM3") is DATA_SHEETS["h100"]
    assert data_sheet_of("NVIDIA GeForce RTX 5090") is DATA_SHEETS["rtx5090"]
    assert data_sheet_of("NVIDIA A100-SXM4-40GB") is None
    for device in DATA_SHEETS.values():
        assert device.rates["fp32"] < device.rates["bf16"] < device.rates["fp8"]
