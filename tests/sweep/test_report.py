"""The page of a sweep and its pictures."""

import re
from pathlib import Path

import yaml
from optuna.trial import TrialState

from owl.sweep.report import write_report
from tests.helpers.sweeps import load_study, plan_of
from tests.helpers.tiny import write_config


def test_the_report_shows_every_trial_and_best_yaml_is_the_best_run(tmp_path: Path) -> None:
    plan = plan_of(trials=9)
    sweep = load_study(tmp_path, plan)
    for value in range(8):
        number, _ = sweep.ask()
        sweep.storage.set_trial_intermediate_value(sweep.trial_id(number), 1, 3.0)
        if value < 6:
            sweep.tell(number, TrialState.COMPLETE, 20.0 + value)
        elif value == 6:
            sweep.tell(number, TrialState.FAIL, reason="a | b")
        else:
            sweep.tell(number, TrialState.PRUNED, pruned=1)
    sweep.ask()
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
    write_report(sweep, tmp_path, "python -m owl sweep")
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
    plan = plan_of(space={key: {"choices": [1]} for key in keys})
    assert plan.names == {
        "a.init_args.lr": "a.lr",
        "b.init_args.lr": "b.lr",
        "c.weights.kl": "kl",
    }
