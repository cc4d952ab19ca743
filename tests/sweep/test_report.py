"""The page of a sweep and its pictures."""

import re
from pathlib import Path

import yaml
from optuna.trial import TrialState

from owl.sweep import pictures
from owl.sweep.report import short_names, write_report
from owl.sweep.study import Outcome
from tests.helpers.sweeps import begin, plan_of
from tests.helpers.tiny import write_config


def test_the_report_shows_every_trial_and_best_yaml_is_the_best_run(tmp_path: Path) -> None:
    plan = plan_of(trials=9)
    sweep = begin(tmp_path, plan)
    outcomes = [Outcome(TrialState.COMPLETE, 20.0 + n) for n in range(6)]
    outcomes += [
        Outcome(TrialState.FAIL, reason="a | b"),
        Outcome(TrialState.PRUNED, reason="pruned after 1 validation"),
    ]
    for outcome in outcomes:
        number, _ = sweep.claim(plan)
        sweep.report(number, 1, 3.0)
        sweep.tell(number, outcome)
    sweep.claim(plan)
    run = tmp_path / "tried" / "trial-0005"
    run.mkdir(parents=True)
    callbacks = [{"class_path": "owl.callbacks.pruning.Pruning"}, {"class_path": "a.Kept"}]
    configuration = {
        "name": "tried/trial-0005",
        "ckpt_path": "x",
        "overwrite": True,
        "trainer": {"callbacks": callbacks},
    }
    write_config(run / "config.yaml", configuration)
    write_report(sweep, plan, tmp_path, "python -m owl sweep")
    folder = tmp_path / "tried"
    text = (folder / "report.md").read_text()
    assert "9 of 9 trials: 6 complete, 1 failed, 1 pruned, 1 running" in text
    assert "Trial 5, in trial-0005: `val/psnr` 25." in text
    assert "a \\| b" in text
    assert len(re.findall(r"^\| \[?\d", text, re.MULTILINE)) == 9
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (folder / picture).stat().st_size > 5000
    assert len(re.findall(r"!\[", text)) == 3
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best == {
        "name": "tried-best",
        "ckpt_path": None,
        "overwrite": False,
        "trainer": {"callbacks": callbacks[1:]},
    }
    assert not list(folder.glob("report.lock*"))


def test_columns_have_short_names_that_differ() -> None:
    keys = ["a.init_args.lr", "b.init_args.lr", "c.weights.kl"]
    assert short_names(keys) == {"a.init_args.lr": "a.lr", "b.init_args.lr": "b.lr", "c.weights.kl": "kl"}


def test_values_stand_where_they_belong_on_an_axis() -> None:
    scale = pictures.Scale(None, 1e-4, 1e-2, log=True)
    assert [round(scale.height(v), 3) for v in (1e-4, 1e-3, 1e-2)] == [0, 0.5, 1]
    assert [pictures.Scale(["a", "b", "c"], 0, 1, False).height(v) for v in "abc"] == [0, 0.5, 1]
    assert pictures.Scale.of_numbers([3.0], log=False).height(3.0) == 0.5
