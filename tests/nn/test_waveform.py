"""Layers along time: initialisation, alignment, reach, and streams that equal the whole."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from owl.nn.snake import SnakeBeta
from owl.nn.waveform import (
    SNAKE_GAIN,
    Blocks,
    Convolution1d,
    Down1d,
    ResidualUnit,
    Stream,
    Sum,
    Unblocks,
    Up1d,
    cosines,
    reach,
)


def layers(causal: bool, weight_norm: bool = True) -> nn.Sequential:
    """Something with every layer, whose stages shrink by 6 and grow by 4."""
    shared: dict[str, Any] = {"causal": causal, "weight_norm": weight_norm}
    sequence = nn.Sequential(
        Convolution1d(2, 4, 7, **shared),
        ResidualUnit(4, 3, 2, **shared),
        Down1d(4, 6, 2, gain=1, **shared),
        SnakeBeta(6),
        Down1d(6, 6, 3, gain=1, **shared),
        ResidualUnit(6, 1, 2, **shared),
        Sum(nn.Sequential(Up1d(6, 4, 4, gain=1, **shared)), Unblocks(6, 4, 4, 1)),
        Convolution1d(4, 3, 3, dilation=2, bias=False, **shared),
    )
    with torch.no_grad():
        for parameter in sequence.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # residual branches are off zero
    return sequence.double()


def dependence(sequence: nn.Module, x: Tensor, output: int) -> tuple[int, int]:
    """The first and the last input step that an output depends on."""
    x = x.clone().requires_grad_()
    sequence(x)[..., output].sum().backward()
    assert x.grad is not None
    steps = x.grad.abs().sum((0, 1)).nonzero().flatten()
    return int(steps[0]), int(steps[-1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("output", [64, 65, 66, 67])
def test_an_output_depends_on_what_reach_says(causal: bool, output: int) -> None:
    assert dependence(layers(causal), torch.randn(1, 2, 240).double(), output) == reach(layers(causal), output, output)


@pytest.mark.parametrize("causal", [False, True])
@settings(max_examples=12)
@given(cuts=st.lists(st.integers(0, 120), max_size=5))
def test_chunks_of_any_length_give_the_whole(causal: bool, cuts: list[int]) -> None:
    torch.manual_seed(0)
    sequence, x = layers(causal), torch.randn(2, 2, 120).double()
    stream = Stream(sequence)
    chunks = [stream(x[..., first:after]) for first, after in pairwise([0, *sorted(cuts), 120])]
    chunks.append(stream(x[..., 120:], last=True))
    torch.testing.assert_close(torch.cat(chunks, -1), sequence(x), rtol=0, atol=1e-12)


def test_a_causal_stream_gives_every_output_at_once() -> None:
    stream = Stream(layers(causal=True))
    assert [stream(torch.randn(1, 2, 6).double()).shape[-1] for _ in range(3)] == [4, 4, 4]


@pytest.mark.parametrize("weight_norm", [False, True])
def test_white_noise_keeps_its_level(weight_norm: bool) -> None:
    shared: dict[str, Any] = {"causal": False, "weight_norm": weight_norm}
    x = torch.randn(4, 32, 4000)
    for layer in (Convolution1d(32, 64, 7, dilation=3, **shared), Down1d(32, 64, 4, gain=1, **shared)):
        assert layer(x).std().item() == pytest.approx(1, rel=0.05)
    assert Up1d(32, 16, 5, gain=1, **shared)(x).std().item() == pytest.approx(1, rel=0.05)
    assert (SNAKE_GAIN * SnakeBeta(32)(x)).square().mean().sqrt().item() == pytest.approx(1, rel=0.01)
    assert torch.equal(ResidualUnit(32, 9, 4, **shared)(x), x)


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_up_is_a_transposed_convolution(factor: int) -> None:
    up = Up1d(3, 4, factor, gain=1, causal=False, weight_norm=False).double()
    x = torch.randn(2, 3, 7).double()
    kernel = up.convolution.weight.unflatten(0, (4, factor))  # [out, step, in, tap]: tap 1 is the step's own input
    transposed = torch.cat([kernel[..., 1], kernel[..., 0]], 1).permute(2, 0, 1)  # [in, out, 2 * factor]
    options = {"padding": (factor + 1) // 2, "output_padding": factor % 2, "stride": factor}
    expected = nn.functional.conv_transpose1d(x, transposed, **options)
    with torch.no_grad():
        up.convolution.bias.zero_()  # type: ignore[union-attr]
    torch.testing.assert_close(up(x), expected)


@pytest.mark.parametrize(("channels", "features", "size"), [(1, 4, 9), (2, 5, 8), (2, 12, 6)])
def test_cosines_are_orthonormal(channels: int, features: int, size: int) -> None:
    rows = cosines(channels, features, size).flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(features), rtol=0, atol=1e-6)


def test_features_beyond_the_samples_start_at_zero() -> None:
    rows = cosines(2, 7, 3).flatten(1)
    torch.testing.assert_close(rows[:6] @ rows[:6].T, torch.eye(6), rtol=0, atol=1e-6)
    assert not rows[6].any()


def test_all_coefficients_of_a_block_restore_it() -> None:
    x = torch.randn(1, 2, 12)
    inverse = Unblocks(8, 2, 4, 3.0)
    torch.testing.assert_close(inverse(Blocks(2, 8, 4, 1 / 3)(x)), x)
    assert inverse.convolution.weight.is_contiguous()  # as optimisers and torch.nn.utils expect
