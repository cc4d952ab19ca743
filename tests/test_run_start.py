"""A run folder is one process's at a time, changes only when training starts, and is the same with every logger."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from owl import run_folder
from owl.commands import rerun
from owl.run_folder import training_in
from tests.helpers.errors import refused
from tests.helpers.lab import checkpoint, fit, make_lab
from tests.helpers.tiny import owl_here

LOGGERS = {
    "csv": ("--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "elsewhere"),
    "nowhere": ("--trainer.logger", "tests.helpers.loggers.Placeless"),
    "here": ("--trainer.logger", "tests.helpers.loggers.Placeless", "--trainer.logger.save_dir", "."),
    "none": ("--trainer.logger", "false"),
    "several": (
        *("--trainer.logger+", "tests.helpers.loggers.Placeless"),
        *("--trainer.logger+", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "elsewhere"),
    ),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lab(tmp_path_factory.mktemp("run_start"))


@pytest.fixture(scope="module")
def run(lab: Path) -> str:
    """A run that stopped within an epoch."""
    assert fit(lab, "first") == 0
    return "first"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("logger", LOGGERS)
def test_the_configuration_is_in_the_run_folder_whatever_the_logger(lab: Path, logger: str) -> None:
    (lab / "config.yaml").write_text("the user's own")
    assert fit(lab, logger, *LOGGERS[logger], "--trainer.max_steps", "1") == 0
    assert (lab / "config.yaml").read_text() == "the user's own"
    assert yaml.safe_load((lab / "runs" / logger / "config.yaml").read_text())["name"] == logger
    assert [path for path in lab.rglob("config.yaml") if "runs" not in path.parts] == [lab / "config.yaml"]
    assert not list((lab / "runs" / logger).glob("events*"))


def test_a_run_of_another_logger_can_be_repeated(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, owl_here(*command[3:], cwd=lab))

    monkeypatch.setattr(rerun, "subprocess", SimpleNamespace(run=run))
    assert fit(lab, "placeless", *LOGGERS["nowhere"], "--trainer.max_steps", "1") == 0
    assert owl_here("rerun", "runs/placeless", cwd=lab) == 0
    assert "equals runs/placeless" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["1e-3", "0x10", "null", "true", "2026-01-01", "~", ".5", "1_000"])
def test_a_name_that_looks_like_something_else_stays_a_name(
    lab: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        owl_here("fit", "--config", "tiny.yaml", "--name", name, "--print_config", cwd=lab)
    (lab / "printed.yaml").write_text(capsys.readouterr().out)
    assert yaml.safe_load((lab / "printed.yaml").read_text())["name"] == name
    with pytest.raises(SystemExit):
        owl_here("fit", "--config", "printed.yaml", "--print_config", cwd=lab)
    assert capsys.readouterr().out == (lab / "printed.yaml").read_text()


def test_a_run_named_like_a_number_is_written_under_its_name(lab: Path) -> None:
    assert fit(lab, "1e-3", "--trainer.max_steps", "1") == 0
    config = lab / "runs" / "1e-3" / "config.yaml"
    assert owl_here("fit", "--config", str(config), "--ckpt_path", "last", "--trainer.max_steps", "2", cwd=lab) == 0
    assert checkpoint(lab, "1e-3")["global_step"] == 2
    assert not (lab / "runs" / "0.001").exists()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--ckpt_path", "last", "--data.batch_size", "3"), "loader.other-order"),
        (("--ckpt_path", "last", "--model.network.widths", "[8, 16, 32]"), "checkpoint.other-network"),
        (("--ckpt_path", "last", "--data.path", "nowhere"), "dataset.missing"),
        (
            ("--ckpt_path", "other.ckpt", "--overwrite", "true", "--model.network.middle_block", "true"),
            "checkpoint.other-network",
        ),
        (("--overwrite", "true", "--data.batch_size", "1000"), "loader.too-few-windows"),
        (("--overwrite", "true", "--trainer.max_steps", "0"), "run.nothing-to-train"),
    ],
)
def test_a_start_that_is_refused_changes_nothing(lab: Path, run: str, options: tuple[str, ...], code: str) -> None:
    folder = lab / "runs" / "refused"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(lab / "runs" / run, folder)
    shutil.copy(folder / "checkpoints" / "last.ckpt", lab / "other.ckpt")
    before = files(folder)
    with refused(code):
        fit(lab, "refused", "--trainer.max_steps", "9", *options)
    assert files(folder) == before


def test_what_a_run_overwrites_is_gone_when_it_trains(lab: Path, run: str) -> None:
    folder = lab / "runs" / "renewed"
    shutil.copytree(lab / "runs" / run, folder)
    (folder / "checkpoints" / "best.ckpt").write_bytes(b"the other's")
    (folder / "hparams.yaml").write_text("{}")
    assert fit(lab, "renewed", "--overwrite", "true", "--trainer.max_steps", "1") == 0
    assert checkpoint(lab, "renewed")["global_step"] == 1
    assert not (folder / "checkpoints" / "best.ckpt").exists()
    assert len(list(folder.glob("events*"))) == 1
    assert yaml.safe_load((folder / "hparams.yaml").read_text())["warmup_steps"] == 2
    assert sorted(path.name for path in (folder / "media").iterdir()) == ["step-0000001"]


@pytest.mark.parametrize("name", ["rehearsal", "first"])
def test_a_fast_dev_run_leaves_nothing(lab: Path, run: str, name: str) -> None:
    before = files(lab / "runs" / name)
    options = ("--trainer.fast_dev_run", "2", "--checkpoint.monitor", "val/psnr", "--checkpoint.every_n_steps", "1")
    assert fit(lab, name, *options) == 0
    assert files(lab / "runs" / name) == before
    assert (lab / "runs" / name).exists() == bool(before)


@pytest.mark.parametrize(
    "option", ["--trainer.max_steps=0", "--trainer.limit_train_batches=0", "--trainer.max_epochs=0"]
)
def test_a_run_without_a_step_is_refused(lab: Path, option: str) -> None:
    with refused("run.nothing-to-train", option.removeprefix("--").partition("=")[0]):
        fit(lab, "nothing", option)
    assert files(lab / "runs" / "nothing") == {}


def test_a_run_that_is_further_stays_as_it_is(lab: Path, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = (lab / "runs" / run / "config.yaml").read_bytes()
    assert fit(lab, run, "--ckpt_path", "last", "--trainer.max_steps", "2") == 0
    assert "it was already finished, at step 4 with trainer.max_steps 2" in capsys.readouterr().out
    assert (lab / "runs" / run / "config.yaml").read_bytes() == config


# ------------------------------------------------------------ one process at a time


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[Path], int]]:
    """Let another process hold a folder; returns its number."""
    children = []

    def start(folder: Path) -> int:
        ready, written = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                with training_in(folder):
                    os.write(written, b"!")
                    signal.pause()
            finally:
                os._exit(0)
        children.append(child)
        assert os.read(ready, 1) == b"!"
        return child

    yield start
    for child in children:
        if psutil.pid_exists(child):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_two_runs_do_not_share_a_folder(lab: Path, run: str, hold: Callable[[Path], int]) -> None:
    folder = lab / "runs" / run
    child = hold(folder)
    before = files(folder)
    for options in (("--ckpt_path", "last", "--trainer.max_steps", "5"), ("--overwrite", "true")):
        with refused("run.busy", f"runs/{run}", str(child)):
            fit(lab, run, *options)
    assert files(folder) == before
    assert owl_here("validate", "--config", "tiny.yaml", "--name", run, "--ckpt_path", "last", cwd=lab) == 0
    kill(child)  # nothing is left that would block others
    assert fit(lab, run, "--ckpt_path", "last", "--trainer.max_steps", "5") == 0
    assert not (folder / run_folder.LOCK).exists()


def test_a_process_elsewhere_counts_while_it_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold: Callable[[Path], int]
) -> None:
    for name, seconds in (("LEASE", 1.0), ("SIGN_OF_LIFE", 0.2), ("POLL", 0.05)):
        monkeypatch.setattr(run_folder, name, seconds)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    child = hold(tmp_path)
    monkeypatch.undo()
    for name, seconds in (("LEASE", 1.0), ("SIGN_OF_LIFE", 0.2), ("POLL", 0.05)):
        monkeypatch.setattr(run_folder, name, seconds)
    with refused("run.busy", "elsewhere"), training_in(tmp_path):
        pass
    kill(child)
    with training_in(tmp_path):  # after a second of silence
        pass
    assert not (tmp_path / run_folder.LOCK).exists()
