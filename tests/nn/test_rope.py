"""Positions enter attention as differences alone, at any time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from owl.nn.rope import PERIOD, apply_rope, rope, split_channels, time_frequencies

times = st.one_of(st.integers(0, 4 * PERIOD), st.integers(10**11, 10**11 + PERIOD))


def score(asking: tuple[int, float, float], asked: tuple[int, float, float], head_width: int = 32) -> float:
    """The scalar product of two fixed vectors that stand at (time, row, column)."""
    vectors = torch.randn(2, 1, 1, 1, head_width, generator=torch.Generator().manual_seed(1))
    query, key = (
        apply_rope(x, rope(torch.tensor([[t]]), torch.tensor([row]), torch.tensor([column]), head_width))
        for x, (t, row, column) in zip(vectors, (asking, asked), strict=True)
    )
    return float((query * key).sum())


@given(start=times, distance=st.integers(-200, 200), row=st.integers(-9, 9), column=st.integers(-9, 9))
def test_only_differences_of_positions_matter(start: int, distance: int, row: int, column: int) -> None:
    near = score((1000 + distance, row, column), (1000, 0, 0))
    far = score((start + 1000 + distance, row + 5, column + 7), (start + 1000, 5, 7))
    assert far == pytest.approx(near, abs=1e-4)


def test_every_difference_counts() -> None:
    here = score((100, 0, 0), (100, 0, 0))
    for other in ((101, 0, 0), (99, 0, 0), (100, 1, 0), (100, 0, 1), (140, 0, 0), (100, -1, 0)):
        assert abs(score((100, 0, 0), other) - here) > 0.05


@pytest.mark.parametrize("start", [PERIOD - 3, 1000 * PERIOD - 2, 10**15])
def test_the_turns_are_continuous_across_the_period(start: int) -> None:
    row = column = torch.zeros(1)
    near = rope(torch.arange(8)[None], row, column, 64)
    far = rope(start + torch.arange(8)[None], row, column, 64)

    def advance(turns: Tensor) -> Tensor:
        return torch.view_as_complex(turns)[:, 1:] * torch.view_as_complex(turns)[:, :-1].conj()

    torch.testing.assert_close(advance(far), advance(near), atol=1e-5, rtol=0)
    assert far.isfinite().all()


@pytest.mark.parametrize("head_width", [16, 32, 64, 128])
def test_frequencies_are_whole_and_distinct_and_fill_the_head(head_width: int) -> None:
    for_time, for_space = split_channels(head_width)
    assert for_time + 2 * for_space == head_width
    frequencies = time_frequencies(for_time)
    assert frequencies.dtype == torch.int64
    assert (frequencies.diff() < 0).all()
    radians = frequencies * 2 * torch.pi / PERIOD
    assert radians[0].item() == pytest.approx(1, rel=1e-4)
    assert radians[-1].item() == pytest.approx(1 / 64, rel=1e-2)
    turns = rope(torch.arange(3)[None], torch.zeros(5), torch.zeros(5), head_width)
    assert turns.shape == (1, 15, head_width // 2, 2)
    torch.testing.assert_close(turns.square().sum(-1), torch.ones(1, 15, head_width // 2))


def test_each_item_of_a_batch_has_its_own_times() -> None:
    time = torch.tensor([[0, 1], [7, 8]])
    turns = rope(time, torch.arange(3.0), torch.zeros(3), 16)
    assert turns.shape == (2, 6, 8, 2)
    for item in range(2):
        assert torch.equal(turns[item : item + 1], rope(time[item : item + 1], torch.arange(3.0), torch.zeros(3), 16))


def test_a_head_that_cannot_be_divided_is_reported() -> None:
    with pytest.raises(ValueError, match="head_width is 24, expected a multiple of 16"):
        split_channels(24)


def test_tokens_without_a_place_are_not_rotated() -> None:
    time, row, column = torch.tensor([[3, 70_000]]), torch.arange(3.0), torch.ones(3)
    turns = rope(time, row, column, 16, torch.tensor([True, False, True])).unflatten(1, (2, 3))
    assert torch.equal(turns[:, :, 1], torch.tensor([1.0, 0.0]).expand(1, 2, 8, 2))
    expected = rope(time, row, column, 16).unflatten(1, (2, 3))
    assert torch.equal(turns[:, :, [0, 2]], expected[:, :, [0, 2]])
