"""Pruning: trials are pruned, promising ones go on, an objective that is not logged is told."""

from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from owl.callbacks.pruning import Pruning
from owl.sweep.plan import Plan
from tests.helpers.errors import refused
from tests.helpers.line import Line, loader, trainer
from tests.helpers.sweeps import load_study, plan_of, url_of


class Bad(Line):
    """Logs an objective that does not get better."""

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/psnr", 1.0)


def fit_line(folder: Path, plan: Plan, number: int, **limits: Any) -> Any:
    callback = Pruning(url_of(folder, plan), plan.name, number)
    limits = {"max_steps": 8, "val_check_interval": 2, "check_val_every_n_epoch": None, **limits}
    run = trainer(folder, [callback], **limits)
    run.fit(Bad(), loader(8), loader(1))
    return run


def test_a_pruned_trial_is_stopped_and_noted(tmp_path: Path) -> None:
    plan = plan_of(pruner={"name": "median", "n_startup_trials": 1})
    sweep = load_study(tmp_path, plan)
    first, _ = sweep.ask()
    for step in range(1, 5):
        sweep.storage.set_trial_intermediate_value(sweep.trial_id(first), step, 5.0)
    sweep.tell(first, TrialState.COMPLETE, 5.0)
    second, _ = sweep.ask()
    assert fit_line(tmp_path, plan, second).global_step == 2
    trial = sweep.trial(second)
    assert trial.intermediate_values == {1: 1.0}
    assert trial.user_attrs["pruned"] == 1
    third, _ = sweep.ask()
    fit_line(tmp_path, plan, third, max_steps=-1, max_epochs=1, val_check_interval=8)
    assert "pruned" not in sweep.trial(third).user_attrs  # it has just finished


def test_a_promising_trial_is_reported_and_not_pruned(tmp_path: Path) -> None:
    plan = plan_of(pruner="none")
    sweep = load_study(tmp_path, plan)
    number, _ = sweep.ask()
    assert fit_line(tmp_path, plan, number).global_step == 8
    assert sweep.trial(number).intermediate_values == dict.fromkeys(range(1, 5), 1.0)


def test_an_objective_that_is_not_logged_is_reported_after_the_first_validation(tmp_path: Path) -> None:
    plan = plan_of(objective="val/psnrr")
    sweep = load_study(tmp_path, plan)
    number, _ = sweep.ask()
    with refused("sweep.objective", "'val/psnrr'", "did you mean 'val/psnr'?", "train/loss"):
        fit_line(tmp_path, plan, number)
