"""Configuration: files that merge, references between them, and one line for every mistake, with the nearest name."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from owl.__main__ import main
from owl.cli.arguments import config_files
from tests.helpers.errors import check_line, refused
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import owl_here, tiny_experiment, write_config

Tell = Callable[..., str]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with base.yaml; its dataset is never opened."""
    write_config(tmp_path / "base.yaml", tiny_experiment(Path("data")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tell(lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tell:
    """Run a mistaken ``fit`` as users do; it must end with status 2 and one line, which is returned."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["owl", "fit", *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as exit_:
            main()
        lines = capsys.readouterr().err.strip().splitlines()
        assert exit_.value.code == 2
        assert len(lines) == 1, lines
        assert not (lab / "runs").exists()
        return lines[0]

    return run


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
    assert config["model"]["init_args"]["weights"] == {
        "l1": 1.0,
        "l2": 0.0,
        "logit_laplace": 0.0,
        "lpips": 0.0,
        "dwt": 0.0,
        "kl": 0.5,
    }


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


def at(path: str, value: Any) -> dict[str, Any]:
    """A configuration with one value."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


EARLY_STOPPING = "lightning.pytorch.callbacks.EarlyStopping"
NETWORK = "model.init_args.network"
# What is written into wrong.yaml, the error's code, and what the line must name.
MISTAKES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "key at the top": (
        at("trianer.max_steps", 3),
        "arguments.unknown-key",
        ["wrong.yaml: key 'trianer'", "'trainer'"],
    ),
    "key of the trainer": (
        at("trainer.max_step", 3),
        "arguments.unknown-key",
        ["wrong.yaml: key 'trainer.max_step'", "'max_steps'"],
    ),
    "key of the recipe": (
        at("model.init_args.warmup_step", 3),
        "arguments.unknown-key",
        ["wrong.yaml: key 'model.init_args.warmup_step'", "owl.recipes.image_vae.ImageVAE", "'warmup_steps'"],
    ),
    "key of the weights": (
        at("model.init_args.weights.logit_laplac", 3),
        "arguments.unknown-key",
        ["wrong.yaml: key 'model.init_args.weights.logit_laplac'", "'logit_laplace'"],
    ),
    "key of the network": (
        at(f"{NETWORK}.init_args.latent_chanels", 3),
        "arguments.unknown-key",
        [f"wrong.yaml: key '{NETWORK}.init_args.latent_chanels'", "'latent_channels'"],
    ),
    "key of the data": (
        at("data.init_args.batchsize", 3),
        "arguments.unknown-key",
        ["wrong.yaml: key 'data.init_args.batchsize'", "'batch_size'"],
    ),
    "key of the average": (
        at("ema.decai", 0.5),
        "arguments.unknown-key",
        ["wrong.yaml: key 'ema.decai'", "'decay'"],
    ),
    "type of the trainer": (
        at("trainer.max_steps", "many"),
        "arguments.wrong-value",
        ["wrong.yaml: key 'trainer.max_steps'", "'many'", "int"],
    ),
    "type of the network": (
        at(f"{NETWORK}.init_args.latent_channels", "four"),
        "arguments.wrong-value",
        [f"wrong.yaml: key '{NETWORK}.init_args.latent_channels'", "'four'", "int"],
    ),
    "type of the recipe": (
        at("model.init_args.sample", "perhaps"),
        "arguments.wrong-value",
        ["wrong.yaml: key 'model.init_args.sample'", "'perhaps'", "bool"],
    ),
    "key of a callback": (
        at("trainer.callbacks", [{"class_path": EARLY_STOPPING, "init_args": {"monitor": "val/psnr", "patince": 3}}]),
        "arguments.unknown-key",
        ["wrong.yaml: key 'trainer.callbacks.0.init_args.patince'", EARLY_STOPPING, "'patience'"],
    ),
    "key of the optimizer": (
        at("model.init_args.optimizer", {"class_path": "owl.optim.MuonAdamW", "init_args": {"learning_rate": 0.1}}),
        "arguments.unknown-key",
        ["wrong.yaml: key 'model.init_args.optimizer.init_args.learning_rate'", "owl.optim.MuonAdamW", "muon_ratio"],
    ),
    "class of the optimizer": (
        at("model.init_args.optimizer", {"class_path": "torch.optim.AdamV"}),
        "arguments.unknown-class",
        ["wrong.yaml: key 'model.init_args.optimizer.class_path'", "'torch.optim.AdamV'", "'torch.optim.Adam"],
    ),
    "a choice": (
        at("checkpoint.mode", "maximum"),
        "arguments.wrong-value",
        ["wrong.yaml: key 'checkpoint.mode'", "'maximum'", "min, max", "'max'"],
    ),
    "a value out of range": (at("ema.decay", 1.5), "ema.decay", ["ema.decay", "1.5", "[0, 1)"]),
    "class that is not there": (
        at(f"{NETWORK}.class_path", "owl.models.image_autoencoder.ImageAutoencodr"),
        "arguments.unknown-class",
        [f"wrong.yaml: key '{NETWORK}.class_path'", "'owl.models.image_autoencoder.ImageAutoencoder'"],
    ),
    "class of another kind": (
        at("model.class_path", "owl.models.image_autoencoder.ImageAutoencoder"),
        "arguments.unknown-class",
        ["wrong.yaml: key 'model.class_path'", "owl.models.image_autoencoder.ImageAutoencoder", "LightningModule"],
    ),
    "module that is not there": (
        at("model.class_path", "owl.recipe.image_vae.ImageVAE"),
        "arguments.unknown-class",
        ["wrong.yaml: key 'model.class_path'", "owl.recipe.image_vae.ImageVAE"],
    ),
    "network that cannot be": (
        at(f"{NETWORK}.init_args.latent_channels", 3),
        "network.arguments",
        ["latent_channels", "3", "16"],
    ),
    "reference to nothing": (
        at("trainer.max_steps", "${data.init_args.batch_sise}"),
        "arguments.unknown-reference",
        ["wrong.yaml: key 'trainer.max_steps'", "${data.init_args.batch_sise}", "'data.init_args.batch_size'"],
    ),
    "variable that is not set": (
        at("trainer.max_steps", "${oc.env:OWL_NOT_SET}"),
        "arguments.unset-variable",
        ["wrong.yaml: key 'trainer.max_steps'", "OWL_NOT_SET", "${oc.env:OWL_NOT_SET,VALUE}"],
    ),
    "reference that is none": (at("runs", "${oc.envv:HOME}"), "arguments.bad-reference", ["wrong.yaml: key 'runs'"]),
    "references in a circle": (
        {"runs": "${name}", "name": "${runs}"},
        "arguments.bad-reference",
        ["wrong.yaml: key 'name'"],
    ),
    "what no run can do without": (
        at("trainer.enable_checkpointing", False),
        "trainer.refused",
        ["trainer.enable_checkpointing"],
    ),
    "a trainer of Lightning alone": (at("trainer.barebones", True), "trainer.refused", ["barebones", "owl bench"]),
    "an accelerator that is not there": (at("trainer.accelerator", "gpuu"), "trainer.refused", ["gpuu"]),
    "a value of several types": (
        at("trainer.precision", "fp16"),
        "arguments.wrong-value",
        ["wrong.yaml: key 'trainer.precision'", "'fp16'", "bf16-true, bf16-mixed, 32-true", "'bf16'"],
    ),
    "a number in the place of a section": (
        at("trainer", 3),
        "arguments.no-mapping",
        ["wrong.yaml: key 'trainer'", "'3'"],
    ),
    "no recipe": (at("model", 3), "arguments.no-mapping", ["wrong.yaml: key 'model'", "'3'"]),
    "weights in bfloat16": (at("trainer.precision", "bf16-true"), "trainer.precision", ["bf16-true", "bf16-mixed"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_configuration_is_told_in_one_line(lab: Path, tell: Tell, mistake: str) -> None:
    content, code, named = MISTAKES[mistake]
    write_config(lab / "wrong.yaml", content)
    line = tell("--config", "base.yaml", "--config", "wrong.yaml")
    check_line(line, code, *named)


# What is written on the command line, the error's code, and what the line must name.
MISTAKEN_OPTIONS = {
    ("--trainer.max_step", "3"): ("arguments.unknown-key", ["--trainer.max_step", "'--trainer.max_steps'"]),
    ("--overwrit", "true"): ("arguments.unknown-key", ["--overwrit", "'--overwrite'"]),
    ("--trainer.max_steps", "many"): ("arguments.wrong-value", ["--trainer.max_steps", "'many'"]),
    ("--model.warmup_step", "3"): (
        "arguments.unknown-key",
        ["--model.warmup_step", "owl.recipes.image_vae.ImageVAE", "'warmup_steps'"],
    ),
    ("--model.weights.lpip", "3"): ("arguments.unknown-key", ["--model.weights.lpip", "'lpips'"]),
    ("--model.network.latent_chanels", "3"): (
        "arguments.unknown-key",
        ["--model.network.latent_chanels", "'latent_channels'"],
    ),
    ("more",): ("arguments.no-option", ["'more'", "--help"]),
    ("more.yaml",): ("arguments.no-option", ["'more.yaml'", "--config"]),
}


@pytest.mark.parametrize("words", MISTAKEN_OPTIONS)
def test_a_wrong_option_is_told_the_nearest_one(tell: Tell, words: tuple[str, ...]) -> None:
    code, named = MISTAKEN_OPTIONS[words]
    line = tell("--config", "base.yaml", *words)
    check_line(line, code, *named)


def test_a_file_that_is_missing_or_broken_is_named(lab: Path, tell: Tell) -> None:
    line = tell("--config", "nothing.yaml")
    check_line(line, "arguments.missing-file", repr(str(lab / "nothing.yaml")))
    (lab / "broken.yaml").write_text("trainer:\n  max_steps: [1, 2\nmodel: {")
    line = tell("--config", "base.yaml", "--config", "broken.yaml")
    check_line(line, "arguments.not-yaml", "broken.yaml", "line 3")
    write_config(lab / "absent.yaml", at(NETWORK, "networks/none.yaml"))
    line = tell("--config", "base.yaml", "--config", "absent.yaml")
    check_line(line, "arguments.missing-file", f"absent.yaml: key '{NETWORK}'", "'networks/none.yaml'")


def test_files_in_the_wrong_place_are_told(lab: Path, tell: Tell) -> None:
    line = tell("base.yaml")
    check_line(line, "arguments.no-option", "'base.yaml'")
    line = tell("--config", str(lab))
    check_line(line, "arguments.folder", str(lab))
    with refused("arguments.no-config", "base.yaml"):
        owl_here("bench", "--config", "base.yaml", cwd=lab)


def test_configurations_are_read_in_order_however_they_are_spelled() -> None:
    assert config_files(["--config=a", "--config", "b", "-c", "c", "--x", "d", "-c=e"]) == ["a", "b", "c", "e"]


def test_a_missing_part_is_named(lab: Path, tell: Tell) -> None:
    write_config(lab / "part.yaml", {"trainer": {"max_steps": 3}})
    for line in (tell("--config", "part.yaml"), tell()):
        check_line(line, "arguments.missing-key", "data and model")
    experiment = tiny_experiment(Path("data"))
    del experiment["model"]["init_args"]["network"]
    write_config(lab / "part.yaml", experiment)
    line = tell("--config", "part.yaml")
    check_line(line, "arguments.missing-key", "part.yaml: key 'model.init_args'", "network")
    check_line(tell("--config"), "arguments.missing-value", "--config")
    with refused("arguments.missing-key", "directory"):
        owl_here("export", "a.ckpt", cwd=lab)


def test_a_missing_dataset_is_told(tell: Tell, lab: Path) -> None:
    # the run folder exists by then
    write_config(lab / "wrong.yaml", {"runs": "elsewhere"})
    line = tell("--config", "base.yaml", "--config", "wrong.yaml")
    check_line(line, "dataset.missing", "data")


def test_what_the_trainer_refuses_once_it_knows_the_data_is_told(
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


def test_training_without_an_end_is_told(lab: Path) -> None:
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


def test_a_folder_that_cannot_be_written_is_told(tell: Tell) -> None:
    assert "/proc/runs" in tell("--config", "base.yaml", "--runs", "/proc/runs")


def test_debug_shows_where_it_happened(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(lab / "wrong.yaml", at("trainer.max_step", 3))
    monkeypatch.setattr(sys, "argv", ["owl", "fit", "--config", "wrong.yaml", "--debug"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with refused("arguments.unknown-key", "'trainer.max_step'", "'max_steps'"):
        main()
