"""Configuration files that merge and refer to each other, and what is refused only once a run starts."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from owl.__main__ import main
from owl.cli.lightning import differing_weights
from owl.nn.frozen import freeze, whole_state_dicts
from tests.helpers.errors import check_line, refused
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import owl_here, tiny_experiment, write_config


def printed(lab: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The resolved configuration."""
    with pytest.raises(SystemExit) as exit_:
        owl_here("fit", *arguments, "--print_config", cwd=lab)
    assert exit_.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_later_files_and_then_options_win(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(lab / "longer.yaml", {"trainer": {"max_steps": 50}, "data": {"init_args": {"batch_size": 2}}})
    files = ("--config", "base.yaml", "--config", "longer.yaml")
    config = printed(lab, capsys, *files, "--data.batch_size", "3", "--model.weights.kl", "0.5")
    assert config["trainer"]["max_steps"] == 50
    assert config["trainer"]["log_every_n_steps"] == 1  # the first file's, kept
    assert config["data"]["init_args"]["batch_size"] == 3
    assert config["data"]["init_args"]["size"] == [32, 48]
    assert {"l1": 1.0, "l2": 0.0, "lpips": 0.0, "kl": 0.5}.items() <= config["model"]["init_args"]["weights"].items()


def test_references_reach_across_files_and_follow_overrides(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = {"model": {"init_args": {"network": {"init_args": {"size": "${data.init_args.size}"}}}}}
    write_config(lab / "shared.yaml", shared)
    files = ("--config", "base.yaml", "--config", "shared.yaml")

    def size(*options: str) -> list[int]:
        return printed(lab, capsys, *files, *options)["model"]["init_args"]["network"]["init_args"]["size"]

    assert size() == [32, 48]
    assert size("--data.size", "[48, 32]") == [48, 32]
    write_config(lab / "larger.yaml", {"data": {"init_args": {"size": [64, 96]}}})
    assert size("--config", "larger.yaml") == [64, 96]


def test_a_network_may_be_a_file_of_its_own(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = tiny_experiment(Path("data"))
    (lab / "networks").mkdir()
    write_config(lab / "networks" / "small.yaml", experiment["model"]["init_args"]["network"])
    experiment["model"]["init_args"]["network"] = "networks/small.yaml"
    write_config(lab / "split.yaml", experiment)
    config = printed(lab, capsys, "--config", "split.yaml")
    assert config["model"]["init_args"]["network"]["init_args"]["widths"] == [8, 16, 16]


def test_a_printed_configuration_gives_itself(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(lab, capsys, "--config", "base.yaml", "--trainer.max_steps", "9", "--ema.decay", "0.5")
    assert config["ema"]["decay"] == 0.5
    write_config(lab / "whole.yaml", config)
    assert printed(lab, capsys, "--config", "whole.yaml") == config


def test_callbacks_are_appended(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lightning = "lightning.pytorch.callbacks"
    first = {"class_path": f"{lightning}.LearningRateMonitor", "init_args": {"logging_interval": "step"}}
    write_config(lab / "more.yaml", {"trainer": {"callbacks": [first]}})
    options = ("--trainer.callbacks+", f"{lightning}.RichModelSummary", "--trainer.callbacks.max_depth", "3")
    config = printed(lab, capsys, "--config", "base.yaml", "--config", "more.yaml", *options)
    found = [callback["class_path"] for callback in config["trainer"]["callbacks"]]
    assert found == [f"{lightning}.LearningRateMonitor", f"{lightning}.RichModelSummary"]
    assert config["trainer"]["callbacks"][1]["init_args"]["max_depth"] == 3


def test_training_without_an_end_is_reported(lab: Path) -> None:
    make_dataset(lab / "data", episodes=3, frames=6, size=(32, 48), modalities=("rgb",))
    endless = ("--trainer.max_steps", "-1", "--trainer.max_epochs", "-1")
    with refused("schedule.no-end", "trainer.max_steps"):
        owl_here("fit", "--config", "base.yaml", *endless, cwd=lab)


def test_a_timer_among_the_callbacks_is_taken_as_it_is(lab: Path) -> None:
    """Its default is a string of Lightning's own kind, which YAML refused to write."""
    make_dataset(lab / "data", episodes=3, frames=6, size=(32, 48), modalities=("rgb",))
    timer = "--trainer.callbacks+=lightning.pytorch.callbacks.Timer"
    assert owl_here("fit", "--config", "base.yaml", timer, cwd=lab) == 0
    (written,) = yaml.safe_load((lab / "runs/base/config.yaml").read_text())["trainer"]["callbacks"]
    assert written["init_args"] == {"duration": None, "interval": "step", "verbose": True}
    assert owl_here("fit", "--config", "runs/base/config.yaml", "--name", "again", cwd=lab) == 0
    with refused("trainer.two-limits", "trainer.max_time", "Timer"):
        owl_here("fit", "--config", "base.yaml", timer, "--trainer.max_time", "00:00:01:00", "--name", "two", cwd=lab)


def test_what_the_trainer_refuses_once_it_knows_the_data_is_reported(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(lab / "data", episodes=3, frames=6, size=(32, 48), modalities=("rgb",))
    monkeypatch.setattr(sys, "argv", ["owl", "fit", "--config", "base.yaml", "--trainer.val_check_interval", "100"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    check_line(line, "trainer.refused", "`val_check_interval` (100)")


def test_the_weights_that_differ_are_those_that_a_strict_load_refuses() -> None:
    frozen = freeze(nn.Linear(2, 2))
    network = nn.ModuleDict({"frozen": frozen, "again": nn.Sequential(frozen), "trained": nn.Linear(2, 3)})
    own = network.state_dict()
    with whole_state_dicts():
        whole = network.state_dict()
    changes: list[tuple[dict[str, Tensor], list[str]]] = [
        (own, []),
        (whole, []),
        ({**own, "frozen.bias": torch.zeros(2)}, ["missing frozen.weight"]),
        ({**own, "other": torch.zeros(2)}, ["unexpected other"]),
        (
            {"trained.weight": torch.zeros(4, 2)},
            [
                "missing trained.bias",
                "size mismatch for trained.weight: [4, 2] in the checkpoint, [3, 2] in the configured network",
            ],
        ),
    ]
    for stored, differences in changes:
        assert differing_weights(stored, network) == differences
        with pytest.raises(RuntimeError) if differences else nullcontext():
            network.load_state_dict(stored)
