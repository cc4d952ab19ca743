"""A folder with data and experiments, and short ways to train in it and to look at what came out."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from owl.__main__ import main
from owl.data.shards import DatasetInfo
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import owl_here, tiny_experiment, write_config

VALUE = dict[str, Any]
STEP_THEMSELVES = {"tests.helpers.players.Players", "owl.recipes.gan_decoder.GANDecoder"}
"""Recipes with several optimisers, which accumulate and clip instead of the trainer."""


def make_lab(folder: Path) -> Path:
    """A folder with data, tiny.yaml, and everything that could make resuming go wrong switched on: full.yaml."""
    data = make_dataset(folder / "data", episodes=4, frames=12, size=(32, 48), modalities=("rgb",))
    info = DatasetInfo.load(data)
    info.splits["test"] = info.splits["validation"]  # so that every command must find the same numbers
    info.save(data)
    experiment = tiny_experiment(data)
    write_config(folder / "tiny.yaml", experiment)
    experiment["data"]["init_args"] |= {"flip": 0.5}
    write_config(folder / "full.yaml", demanding(experiment))
    return folder


def demanding(experiment: VALUE) -> VALUE:
    """An experiment of 24 training windows in batches of 4, with everything in its trainer that could go wrong."""
    # 6 batches in an epoch, of which 2 make a step; validation after batches 4, 8, 12, and at the end
    experiment["trainer"] |= {"max_steps": 8, "val_check_interval": 4, "check_val_every_n_epoch": None}
    if experiment["model"]["class_path"] in STEP_THEMSELVES:
        experiment["model"]["init_args"] |= {"accumulate": 2, "clip": 0.5}
    else:
        experiment["trainer"] |= {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    experiment["data"]["init_args"] |= {"validation_windows": 5}  # in two batches
    experiment["checkpoint"] = {"every_n_steps": 3}
    return experiment


def fit(lab: Path, name: str, *options: str, config: str = "tiny.yaml") -> int:
    return owl_here("fit", "--config", config, "--name", name, *options, cwd=lab)


def checkpoint(lab: Path, name: str, which: str = "last") -> VALUE:
    return torch.load(lab / "runs" / name / "checkpoints" / f"{which}.ckpt", weights_only=True)


def error_line(
    arguments: list[str], lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Run a command that must fail as users see it, with one line and status 2; return that line."""
    monkeypatch.chdir(lab)
    monkeypatch.setattr(sys, "argv", ["owl", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]
