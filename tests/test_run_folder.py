"""What a run leaves behind, what it refuses, and how mistakes and bad numbers are reported."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.errors import check_line
from tests.helpers.lab import checkpoint, error_line, fit, make_lab
from tests.helpers.players import tiny_players
from tests.helpers.tiny import owl_here, write_config

TWO_BATCHES = ("--data.validation_windows", "5")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lab(tmp_path_factory.mktemp("run_folder"))


@pytest.mark.parametrize("gradient", [False, True])
def test_nan_stops_and_names_the_samples(
    lab: Path, gradient: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"nan-{gradient}"
    callback = ["--trainer.callbacks+=tests.helpers.faults.SetNaN", "--trainer.callbacks.step=2"]
    options = [*callback, f"--trainer.callbacks.gradient={gradient}", "--checkpoint.every_n_steps", "1"]
    line = error_line(["fit", "--config", "tiny.yaml", "--name", name, *options], lab, monkeypatch, capsys)
    path = Path("runs") / name / "nonfinite-rank0.json"
    what = "a weight" if gradient else "the loss"
    check_line(line, "loss.non-finite", f"{what} became nan at step 3", str(path), "--ckpt_path last")
    record = json.loads((lab / path).read_text())
    assert record["step"] == 3
    assert len(record["samples"]) == len(record["windows"]) == 4
    for window, sample in zip(record["windows"], record["samples"], strict=True):
        assert sample["episode"] == f"episode-{window // 12:03d}"
        assert sample["frames"] == [window % 12, window % 12]
    stored = checkpoint(lab, name)
    assert stored["global_step"] == 2
    assert all(tensor.isfinite().all() for tensor in stored["ema"]["raw"].values())


@pytest.fixture(scope="module")
def finished(lab: Path) -> str:
    """A run with a best checkpoint."""
    assert fit(lab, "finished", "--checkpoint.monitor", "val/psnr", "--checkpoint.mode", "max", *TWO_BATCHES) == 0
    return "finished"


def test_the_run_folder_holds_what_it_should(lab: Path, finished: str) -> None:
    folder = lab / "runs" / finished
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    events = {file for file in files if file.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert files - events == {
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "config.yaml",
        "environment.json",
        "hparams.yaml",
        "media/step-0000004/reconstruction.png",
        "metrics.json",
        "report.md",
    }
    assert yaml.safe_load((folder / "config.yaml").read_text())["name"] == finished


def test_a_checkpoint_names_what_made_it(lab: Path, finished: str) -> None:
    content = checkpoint(lab, finished)  # weights_only=True
    assert content["owl"]["recipe"] == "owl.recipes.image_vae.ImageVAE"
    assert content["owl"]["config"]["model"]["init_args"]["network"]["init_args"]["widths"] == [8, 16, 16]
    assert content["owl"]["config"]["trainer"]["max_steps"] == 4
    assert content["owl"]["code_version"].startswith("0.")
    assert content["owl"]["dataset"]["path"] == str(lab / "data")
    assert len(content["owl"]["dataset"]["identity"]) >= 8
    assert content["owl"]["metrics"]["val/psnr"] > 0


def test_an_existing_run_is_kept_unless_overwritten(
    lab: Path, finished: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(lab / "runs" / finished, lab / "runs" / "kept")
    folder = lab / "runs" / "kept"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    arguments = ["fit", "--config", "tiny.yaml", "--name", "kept"]
    line = error_line(arguments, lab, monkeypatch, capsys)
    check_line(line, "run.exists", "runs/kept", "--ckpt_path last", "--name", "--overwrite true")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert fit(lab, "kept", "--overwrite", "true", "--trainer.max_steps", "2") == 0
    assert checkpoint(lab, "kept")["global_step"] == 2
    assert not (folder / "checkpoints" / "best.ckpt").exists()  # it was the other run's
    assert "media/step-0000002/reconstruction.png" in (folder / "report.md").read_text()
    assert len(list(folder.glob("events*"))) == 1


def test_a_run_is_neither_lost_to_its_own_start_nor_to_another_run_s(
    lab: Path, finished: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(lab / "runs" / finished, lab / "runs" / "own")
    before = {path: path.read_bytes() for path in (lab / "runs" / "own").rglob("*") if path.is_file()}
    arguments = ["fit", "--config", "tiny.yaml", "--name", "own", "--ckpt_path"]
    for start in ("last", "best", "runs/own/checkpoints/best.ckpt"):
        line = error_line([*arguments, start, "--overwrite", "true"], lab, monkeypatch, capsys)
        check_line(line, "run.overwrites-its-start", "--overwrite true", "runs/own/checkpoints/", "--name")
    other = f"runs/{finished}/checkpoints/last.ckpt"
    check_line(error_line([*arguments, other], lab, monkeypatch, capsys), "run.exists", "runs/own")
    assert {path: path.read_bytes() for path in (lab / "runs" / "own").rglob("*") if path.is_file()} == before
    assert fit(lab, "fresh", "--ckpt_path", other, "--trainer.max_steps", "5") == 0
    assert checkpoint(lab, "fresh")["global_step"] == 5


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_measuring_uses_the_averaged_weights(
    lab: Path, finished: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = lab / "runs" / finished
    config = (folder / "config.yaml").read_bytes()
    options = ("--config", "tiny.yaml", "--name", finished, "--ckpt_path", "last", *TWO_BATCHES)
    assert owl_here(command, *options, cwd=lab) == 0
    assert (folder / "config.yaml").read_bytes() == config
    fitted = json.loads((folder / "metrics.json").read_text())
    validated = {key.removeprefix("val/"): value for key, value in fitted.items() if key.startswith("val/")}
    assert len(validated) >= 9
    if command == "predict":
        pictures = sorted((folder / "predictions").glob("batch-*-rank0/reconstruction.png"))
        assert len(pictures) == 2
        assert pictures[0].read_bytes() == (folder / "media" / "step-0000004" / "reconstruction.png").read_bytes()
    else:
        found = json.loads((folder / f"{command}.json").read_text())
        assert found == {f"{'val' if command == 'validate' else 'test'}/{key}": v for key, v in validated.items()}
        shown = capsys.readouterr().out
        assert f"{finished}: {command}" in shown
        assert f"Written to runs/{finished}/{command}.json" in shown
        assert "DataLoader 0" not in shown  # Lightning's table, with its eighteen digits


@pytest.mark.parametrize("command", ["validate", "fit"])
def test_a_wrong_checkpoint_is_reported(
    lab: Path, finished: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def line_of(path: str | Path) -> str:
        arguments = [command, "--config", "tiny.yaml", "--name", f"wrong-{command}", "--ckpt_path", str(path)]
        return error_line(arguments, lab, monkeypatch, capsys)

    check_line(line_of("nothing.ckpt"), "checkpoint.missing", "--ckpt_path nothing.ckpt")
    (lab / "garbage.ckpt").write_bytes(b"no checkpoint at all")
    check_line(line_of("garbage.ckpt"), "checkpoint.unreadable", "garbage.ckpt")
    whole = (lab / "runs" / finished / "checkpoints" / "last.ckpt").read_bytes()
    (lab / "torn.ckpt").write_bytes(whole[: len(whole) // 2])
    check_line(line_of("torn.ckpt"), "checkpoint.unreadable", "torn.ckpt")
    torch.save({"weights": torch.zeros(1)}, lab / "foreign.ckpt")
    check_line(line_of("foreign.ckpt"), "checkpoint.foreign", "foreign.ckpt")
    if command != "fit":
        check_line(
            line_of("last"), "checkpoint.missing", f"runs/wrong-{command}/checkpoints/last.ckpt", "python -m owl fit"
        )
        arguments = [command, "--config", "tiny.yaml", "--name", finished]
        check_line(error_line(arguments, lab, monkeypatch, capsys), "checkpoint.required", command, "--ckpt_path")
        (lab / "runs" / f"wrong-{command}" / "checkpoints").mkdir(parents=True)
        (lab / "runs" / f"wrong-{command}" / "checkpoints" / "last.ckpt").write_bytes(whole)
        check_line(
            line_of("best"), "checkpoint.missing", f"runs/wrong-{command}/checkpoints/best.ckpt", "checkpoint.monitor"
        )


def test_a_checkpoint_of_another_network_is_reported(
    lab: Path, finished: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--name", finished, "--ckpt_path", "last", "--model.network.widths", "[8, 16, 32]"]
    line = error_line(["fit", "--config", "tiny.yaml", *options], lab, monkeypatch, capsys)
    check_line(line, "checkpoint.other-network", f"runs/{finished}/checkpoints/last.ckpt", "size mismatch for network.")
    other = ["--name", finished, "--ckpt_path", "last", "--model.network.middle_block", "true"]
    line = error_line(["fit", "--config", "tiny.yaml", *other], lab, monkeypatch, capsys)
    check_line(line, "checkpoint.other-network", f"runs/{finished}/checkpoints/last.ckpt", "missing network.")


def test_a_checkpoint_of_another_recipe_is_reported(
    lab: Path, finished: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(lab / "players.yaml", tiny_players(Path("data")))
    arguments = ["validate", "--config", "players.yaml", "--ckpt_path", f"runs/{finished}/checkpoints/last.ckpt"]
    line = error_line(arguments, lab, monkeypatch, capsys)
    recipes = ("owl.recipes.image_vae.ImageVAE", "tests.helpers.players.Players")
    check_line(line, "checkpoint.other-network", f"runs/{finished}/checkpoints/last.ckpt", *recipes)


def test_flags_win_over_what_a_checkpoint_remembers(lab: Path, finished: str) -> None:
    assert fit(lab, "flags", "--trainer.max_steps", "1") == 0
    remembered = checkpoint(lab, "flags")["hyper_parameters"]
    assert remembered["warmup_steps"] == 2
    flags = ("--model.weights.l2", "0.5", "--model.warmup_steps", "7", "--trainer.max_steps", "2")
    assert fit(lab, "flags", "--ckpt_path", "last", *flags) == 0
    content = checkpoint(lab, "flags")
    assert content["hyper_parameters"]["warmup_steps"] == 7
    assert content["owl"]["config"]["model"]["init_args"]["weights"]["l2"] == 0.5
    assert "train/l2" in content["owl"]["metrics"]


def test_a_run_that_time_ends_is_planned_reported_annealed_and_validated(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = ("--trainer.callbacks+=tests.helpers.faults.Stopwatch", "--trainer.callbacks.seconds=[1.0]")
    assert fit(lab, "clocked", "--trainer.max_steps", "40", "--trainer.max_time", "00:00:00:20", *clock) == 0
    printed = capsys.readouterr().out
    assert re.search(r"budget: about \d+ of 40 steps in 20 seconds on this machine", printed)
    content = checkpoint(lab, "clocked")
    assert 15 <= content["global_step"] == content["budget"]["changes"][-1][1] < 20
    assert content["lr_schedulers"][0]["_last_lr"] == [0.0]
    metrics = json.loads((lab / "runs" / "clocked" / "metrics.json").read_text())
    assert metrics["steps"] == content["global_step"]
    assert "val/psnr" in metrics
    assert (
        fit(lab, "clocked", "--trainer.max_steps", "40", "--trainer.max_time", "00:00:00:20", "--ckpt_path", "last")
        == 0
    )
    assert "already finished" in capsys.readouterr().out


def test_a_few_seconds_end_a_run_that_has_no_last_step(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the real clock, of which on a busy machine nothing exact can be said."""
    limits = ("--trainer.max_steps", "-1", "--trainer.max_time", "00:00:00:05", "--trainer.limit_val_batches", "0")
    assert fit(lab, "timed", *limits) == 0
    assert re.search(r"budget: about \d+ steps in 5 seconds on this machine", capsys.readouterr().out)
    content = checkpoint(lab, "timed")
    assert content["global_step"] > 2
    assert content["lr_schedulers"][0]["_last_lr"][0] < content["lr_schedulers"][0]["base_lrs"][0]
