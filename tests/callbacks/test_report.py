"""metrics.json is flat and of numbers, report.md shows pictures that exist and says how to repeat the run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from owl.callbacks.media import Media
from owl.callbacks.report import Report
from owl.callbacks.throughput import Throughput
from owl.viz.numbers import format_number
from tests.helpers.line import Line, loader, trainer


def fit(folder: Path, steps: int = 3, checkpoint: Path | None = None, **options: Any) -> Any:
    report = Report()
    report.configuration = {"trainer": {"max_steps": steps}, "name": folder.name}
    callbacks = [Media(), Throughput(), report]
    run = trainer(folder, callbacks, max_steps=steps, log_every_n_steps=1, val_check_interval=1, **options)
    run.fit(Line(), loader(4), loader(1), ckpt_path=checkpoint, weights_only=True)
    return run


def test_metrics_are_flat_numbers_and_the_report_shows_what_exists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert all(isinstance(value, int | float) for value in metrics.values())
    assert {"train/loss", "val/weight", "steps", "seconds", "seed", "data_wait"} == metrics.keys()
    assert metrics["steps"] == 3
    report = (tmp_path / "report.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert pictures == ["media/step-0000003/red.png"]
    assert all((tmp_path / picture).is_file() for picture in pictures)
    for name, value in metrics.items():
        assert f"| {name} | {format_number(value)} |" in report
    assert f"python -m owl rerun {tmp_path}" in report
    configuration = re.search(r"```yaml\n(.*?)```", report, re.DOTALL).group(1)
    assert yaml.safe_load(configuration) == {"trainer": {"max_steps": 3}, "name": tmp_path.name}
    shown = capsys.readouterr().out
    assert f"{tmp_path.name}: Line of 1 trained parameters, 32-true on 1 x cpu" in " ".join(shown.split())
    assert "val/weight" in shown
    assert "Report: " in shown
    assert "tensorboard --logdir" not in shown  # it has no logger


def test_time_adds_up_over_resumes_and_a_finished_run_is_reported_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path, 2)
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["owl"]["recipe"] == "tests.helpers.line.Line"
    assert content["owl"]["metrics"]["steps"] == 2
    content["owl"]["metrics"]["seconds"] = 1000.0
    torch.save(content, tmp_path / "a.ckpt")
    capsys.readouterr()
    fit(tmp_path, 2, tmp_path / "a.ckpt")
    assert json.loads((tmp_path / "metrics.json").read_text()) == content["owl"]["metrics"]
    assert "already finished" in capsys.readouterr().out
    fit(tmp_path, 3, tmp_path / "a.ckpt")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert 1000 <= metrics["seconds"] < 1100
    assert metrics["steps"] == 3
    assert "already finished" not in capsys.readouterr().out


def test_the_report_names_the_clips_of_the_last_validation(tmp_path: Path) -> None:
    for file in ("step-0000001/old.mp4", "step-0000002/clip.mp4", "step-0000002/red.png"):
        path = tmp_path / "media" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    links = re.findall(r"\[.*?\]\((.*?)\)", Report().markdown(tmp_path, {}))
    assert links == ["media/step-0000002/red.png", "media/step-0000002/clip.mp4"]


def test_only_a_run_with_a_configuration_can_be_repeated(tmp_path: Path) -> None:
    report = Report()
    assert "rerun" not in report.markdown(tmp_path, {"steps": 2})
    report.configuration = {"seed_everything": 3}
    text = report.markdown(tmp_path, {"steps": 2})
    assert f"    python -m owl rerun {tmp_path}\n" in text
    assert "seed_everything: 3" in text


def test_a_runs_name_may_hold_brackets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path / "run[v2]", 1)
    shown = " ".join(capsys.readouterr().out.split())
    assert "run[v2]: Line of 1 trained" in shown
    assert "run[v2]: 1 steps" in shown
    assert "run[v2]/report.md" in shown.replace(" ", "")
