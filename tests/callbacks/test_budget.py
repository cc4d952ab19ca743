"""Training that time ends is planned: it ends in time and with its learning rate decayed, however fast the machine."""

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer

from owl.callbacks.budget import Budget, duration, multiples
from owl.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from owl.callbacks.report import Report
from owl.optim.configuration import with_schedule
from tests.helpers.faults import Stopwatch
from tests.helpers.line import Line, loader, trainer

WARMUP = 5
PEAK, FINAL = 1e-4, 1e-6


class Scheduled(Line):
    """A line with the recipes' schedule."""

    def configure_optimizers(self) -> Any:
        return with_schedule(self, torch.optim.SGD([self.weight], lr=PEAK), WARMUP, FINAL / PEAK)


class SaveAt(Callback):
    """Writes one checkpoint, as an interruption after this step would leave it behind."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Fitted:
    """A run with a simulated clock."""

    def __init__(
        self, folder: Path, watch: Stopwatch, *more: Callback, resume: Path | None = None, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.budget, self.watch = Budget(), watch
        callbacks = [watch, *more, self.budget, Report(), Checkpoint(every_n_steps=100)]
        defaults = {"max_steps": 1000, "max_time": {"seconds": 100}, "val_check_interval": 30}
        options = {"check_val_every_n_epoch": None, "plugins": [AtomicCheckpointIO()], **defaults, **options}
        self.trainer = trainer(folder, callbacks, **options)
        self.line = Scheduled()
        self.trainer.fit(self.line, loader(64), loader(2), ckpt_path=resume)
        self.steps, self.rates, self.seconds = self.trainer.global_step, watch.rates, watch.now - watch.start
        self.end = self.trainer.optimizers[0].param_groups[0]["lr"]

    def assert_annealed(self) -> None:
        """It rose to its peak, never rose again, ended low, in time, and with a validation."""
        peak = self.rates.index(max(self.rates))
        assert peak == WARMUP - 1
        assert self.rates[: peak + 1] == sorted(self.rates[: peak + 1])
        falling = [*self.rates[peak:], self.end]
        assert all(a >= b for a, b in pairwise(falling))
        assert self.end == pytest.approx(FINAL)
        assert self.seconds <= 100
        assert self.watch.validated[-1] == self.steps


Fit = Callable[..., Fitted]


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    def run(*watch: Any, more: tuple[Callback, ...] = (), **options: Any) -> Fitted:
        return Fitted(tmp_path, Stopwatch(*watch), *more, **options)

    return run


def test_time_plans_the_last_step_says_so_and_keeps_within_the_limit(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit([1.0], 0, 1, 0, 4.0)
    run.assert_annealed()
    # 3 validations of 4 seconds: after 30 and 60 steps, and at the end, where some seconds are kept for surprises
    assert 84 <= run.steps <= 88
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("budget")]
    assert line == "budget: about 94 of 1000 steps in 100 seconds on this machine; the learning rate ends there"


def test_steps_that_end_in_time_are_not_touched_by_noise(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    noise = random.Random(0)
    watch = [noise.uniform(0.4, 1.4) for _ in range(95)]
    assert 92 < sum(watch) < 97
    run = fit(watch, 0, 1, 0, 0.5, max_steps=95)
    assert run.budget.changes == []
    assert run.rates == fit([1.0], max_steps=95, max_time=None).rates
    assert run.steps == 95
    assert "budget" not in capsys.readouterr().out


def test_a_machine_that_turns_out_slower_decays_sooner(fit: Fit) -> None:
    run = fit([0.5], 0, 4, 60, 2.0)
    run.assert_annealed()
    assert run.seconds > 85


def test_a_machine_that_turns_out_faster_uses_the_time(fit: Fit) -> None:
    run = fit([2.0], 0, 0.25, 20)
    run.assert_annealed()
    assert run.budget.changes[0][1] < 50
    assert run.steps > 100
    assert run.seconds > 90


def test_all_steps_are_made_where_a_slow_start_passes(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit([2.0], 0, 0.1, 20, max_steps=200)
    run.assert_annealed()
    assert run.steps == 200
    assert "budget: now all 200 steps in 100 seconds" in capsys.readouterr().out


def test_a_cycle_of_short_steps_and_a_long_one_is_planned_by_their_mean(fit: Fit) -> None:
    """As where one of two optimisers is stepped in every fifth step."""
    run = fit([0.2, 0.2, 0.2, 0.2, 1.2], max_steps=500)
    run.assert_annealed()
    assert run.seconds > 80


def test_the_first_steps_are_not_taken_for_the_machine_s_speed(fit: Fit) -> None:
    run = fit([0.5], 40, max_steps=110)
    assert run.budget.changes == []
    assert run.steps == 110


def test_a_limit_on_time_alone_is_enough(fit: Fit) -> None:
    run = fit([1.0], 0, 1, 0, 1.0, max_steps=-1)
    run.assert_annealed()
    assert 85 < run.steps < 100


def test_epochs_that_time_cuts_short_are_planned_as_steps_are(fit: Fit) -> None:
    run = fit([1.0], max_steps=-1, max_epochs=5, check_val_every_n_epoch=1, val_check_interval=None)
    run.assert_annealed()
    assert 90 < run.steps < 100


def test_where_steps_take_longer_than_the_warm_up_has_time_the_rate_still_falls(fit: Fit) -> None:
    run = fit([14.0])
    assert 4 <= run.steps <= 6
    assert run.seconds <= 100
    assert run.end == pytest.approx(FINAL)


def test_an_interrupted_run_continues_its_plan_and_its_time(fit: Fit, tmp_path: Path) -> None:
    whole = fit([1.0], 0, 1, 0, 3.0, more=(SaveAt(50, tmp_path / "50.ckpt"),))
    resumed = fit([1.0], 0, 1, 0, 3.0, resume=tmp_path / "50.ckpt")
    assert resumed.budget.changes[: len(whole.budget.changes)] == whole.budget.changes
    following = next((step for step, _ in resumed.budget.changes if step >= 50), resumed.steps)
    assert resumed.rates[: following - 50] == whole.rates[50:following]
    assert resumed.seconds <= 100 - 53
    assert resumed.end == pytest.approx(FINAL)
    assert abs(resumed.steps - whole.steps) <= 3


def test_a_run_that_has_ended_by_time_trains_no_further(fit: Fit, tmp_path: Path) -> None:
    whole = fit([1.0])
    again = fit([1.0], resume=tmp_path / "checkpoints" / "last.ckpt")
    assert again.rates == []
    assert again.steps == 0 or again.steps == whole.steps


def test_another_limit_makes_a_new_plan(fit: Fit, tmp_path: Path) -> None:
    whole = fit([1.0])
    longer = fit([1.0], resume=tmp_path / "checkpoints" / "last.ckpt", max_time={"seconds": 200})
    assert whole.steps + 80 < longer.steps < 200
    assert longer.end == pytest.approx(FINAL)
    step, last = longer.budget.changes[0]
    assert step == 0
    assert last == pytest.approx(2 * whole.steps, abs=8)
    assert longer.rates[1] == pytest.approx(PEAK / 2, rel=0.2)  # as if it had been planned so from the beginning


def test_a_timer_among_the_callbacks_is_a_limit_too(fit: Fit) -> None:
    run = fit([1.0], more=(Timer("00:00:01:40"),), max_time=None)
    run.assert_annealed()
    assert 90 < run.steps < 100
    assert fit([1.0], more=(Timer(),), max_time=None, max_steps=120).steps == 120


def test_a_plan_that_is_given_is_followed_whatever_the_time(fit: Fit, tmp_path: Path) -> None:
    whole = fit([1.0], 0, 2, 40)
    assert len(whole.budget.changes) > 2
    torch.manual_seed(0)
    budget = Budget(whole.budget.changes)
    line = Scheduled()
    watch = Stopwatch([5.0])
    options: Any = {"max_steps": 1000, "val_check_interval": 30, "check_val_every_n_epoch": None}
    callbacks = [watch, budget, Report(), Checkpoint()]
    run = trainer(tmp_path / "again", callbacks, plugins=[AtomicCheckpointIO()], **options)
    run.fit(line, loader(64), loader(2))
    assert watch.rates == whole.rates
    assert budget.changes == whole.budget.changes
    assert line.weight.item() == whole.line.weight.item()


def test_a_validation_is_counted_where_it_comes_before_the_last_step() -> None:
    assert multiples(30, 1, 30) == 0
    assert multiples(30, 1, 31) == 1
    assert multiples(30, 30, 91) == 3
    assert multiples(30, 31, 90) == 1
    assert multiples(float("inf"), 1, 1000) == 0


def test_durations_are_said_in_their_largest_unit() -> None:
    assert [duration(s) for s in (1, 90, 60, 360, 5400, 3600, 7200)] == [
        "1 second",
        "90 seconds",
        "1 minute",
        "6 minutes",
        "90 minutes",
        "1 hour",
        "2 hours",
    ]
