"""The learning rate warms up, falls and ends where it should, wherever the end is moved."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from owl.optim import MuonAdamW
from owl.optim.schedule import WarmupCosine


def optimizer() -> SGD:
    return SGD([nn.Parameter(torch.ones(1))], lr=0.0123)


def rates(
    make: Callable[[Optimizer], LRScheduler], steps: int, ends: dict[int, int] | None = None
) -> tuple[list[float], LRScheduler]:
    """The rate of each step and then that after the last, with the end moved after some steps."""
    descent = optimizer()
    schedule = make(descent)
    seen = []
    for step in range(steps):
        seen.append(descent.param_groups[0]["lr"])
        descent.step()
        schedule.step()
        if ends and step + 1 in ends:
            assert isinstance(schedule, WarmupCosine)
            schedule.move_end(step + 1, ends[step + 1])
    return [*seen, descent.param_groups[0]["lr"]], schedule


@given(st.integers(0, 12), st.integers(1, 80), st.sampled_from([0.0, 0.03, 0.1, 0.5, 1.0]))
def test_with_a_fixed_end_it_is_the_textbook_one_bit_for_bit(warmup: int, total: int, final: float) -> None:
    def textbook(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    expected, plain = rates(lambda o: LambdaLR(o, textbook), total + 3)
    found, schedule = rates(lambda o: WarmupCosine(o, warmup, total, final), total + 3)
    assert found == expected
    assert schedule.state_dict() == plain.state_dict()


@st.composite
def moved_ends(draw: st.DrawFn) -> dict[int, int]:
    """Steps after which the end is moved, and where to; the last one stays."""
    steps = sorted(draw(st.sets(st.integers(1, 60), min_size=1, max_size=6)))
    ends = {step: draw(st.integers(following, 90)) for step, following in pairwise(steps)}
    return ends | {steps[-1]: draw(st.integers(steps[-1], 90))}


@given(st.integers(0, 30), st.none() | st.integers(61, 90), st.sampled_from([0.0, 0.1]), moved_ends())
def test_wherever_its_end_is_moved_it_rises_then_falls_and_ends(
    warmup: int, total: int | None, final: float, ends: dict[int, int]
) -> None:
    seen, _ = rates(lambda o: WarmupCosine(o, warmup, total, final), 95, ends)
    step, last = list(ends.items())[-1]
    peak = seen.index(max(seen))
    assert peak <= max(warmup, step)
    assert all(a <= b for a, b in pairwise(seen[: peak + 1]))
    assert all(a >= b - 1e-9 for a, b in pairwise(seen[peak:]))
    if last > step:  # the rate of the step in progress is known before the end is moved
        assert seen[last:] == pytest.approx([final * 0.0123] * (96 - last))
    if last >= 2 * warmup and all(end >= 2 * warmup for end in ends.values()):
        assert max(seen) == pytest.approx(0.0123)


def test_a_warm_up_longer_than_training_is_cut_short() -> None:
    seen, _ = rates(lambda o: WarmupCosine(o, 50, 1600), 42, {6: 42})
    assert seen[:10] == pytest.approx([0.0123 * (step + 1) / 50 for step in range(10)])
    assert 0.5 < max(seen) / 0.0123 < 0.8
    assert seen[-1] == 0.0


def test_an_end_moved_at_the_start_is_as_if_it_had_been_there() -> None:
    expected, _ = rates(lambda o: WarmupCosine(o, 3, 20), 25)
    schedule = WarmupCosine(optimizer(), 3, 60)
    schedule.move_end(0, 20)
    assert [0.0123 * schedule.factor(step) for step in range(26)] == pytest.approx(expected)


def test_groups_keep_their_own_rates_under_a_schedule() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    groups = [{"params": net[0].parameters(), "lr": 1.0}, {"params": net[1].parameters()}]
    optimizer = MuonAdamW(groups, lr=0.1, muon_ratio=2.0)
    schedule = WarmupCosine(optimizer, warmup_steps=4, total_steps=14, final=0.1)
    rates = []
    for _ in range(16):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx([0.5, 0.25, 0.05, 0.025])
    assert rates[3] == rates[4] == pytest.approx([2.0, 1.0, 0.2, 0.1])
    assert rates[9] == pytest.approx([1.1, 0.55, 0.11, 0.055])
    assert rates[14] == rates[15] == pytest.approx([0.2, 0.1, 0.02, 0.01])
