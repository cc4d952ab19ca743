"""``rerun`` distinguishes runs with the same result from others, and what may explain it."""

import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from owl.checkpoint import load_checkpoint
from owl.commands import rerun
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import owl_here, tiny_experiment, write_config


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a deterministic run of 4 steps, which the clock would have ended had it not been continued."""
    folder = tmp_path_factory.mktemp("rerun")
    make_dataset(folder / "data", episodes=4, frames=12, size=(32, 48), modalities=("rgb",))
    experiment = tiny_experiment(Path("data"), deterministic=True, val_check_interval=2, check_val_every_n_epoch=None)
    write_config(folder / "first.yaml", experiment)
    interrupted = ("--trainer.callbacks+", "owl.callbacks.stop_at.StopAt", "--trainer.callbacks.step", "3")
    assert owl_here("fit", "--config", "first.yaml", *interrupted, cwd=folder) == 0
    assert torch.are_deterministic_algorithms_enabled()
    options = ("--trainer.max_time", "00:00:10:00", "--ckpt_path", "last")
    assert owl_here("fit", "--config", "first.yaml", *options, cwd=folder) == 0
    yield folder
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def here(lab: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Repeat in this process, which is faster than another one."""

    def run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, owl_here(*command[3:], cwd=lab))

    monkeypatch.setattr(rerun, "subprocess", SimpleNamespace(run=run))
    monkeypatch.chdir(lab)
    return lab


def words(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_a_run_repeats_itself_in_another_process(lab: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        yaml.safe_load((lab / "runs/first/config.yaml").read_text())["ckpt_path"] == "runs/first/checkpoints/last.ckpt"
    )
    assert owl_here("rerun", "runs/first", cwd=lab) == 0
    assert "runs/first-again equals runs/first: all of " in " ".join(capfd.readouterr().out.split())
    again = lab / "runs" / "first-again"
    assert json.loads((again / "metrics.json").read_text())["steps"] == 4
    # it was trained from the beginning, not continued where the first one ended
    assert rerun.curves(again).keys() == {
        point for point in rerun.curves(lab / "runs/first") if "val/" not in point[0]
    } | {point for point in rerun.curves(again) if "val/" in point[0]}
    environment = json.loads((again / "environment.json").read_text())
    assert environment["command"].startswith("python -m owl fit --config runs/first/config.yaml --name first-again")
    assert environment["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert environment["devices"]["threads"] == 1


def test_the_start_is_compared_by_what_was_logged(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert owl_here("rerun", "runs/first", "--steps", "2", "--name", "beginning", cwd=here) == 0
    printed = words(capsys)
    assert "runs/beginning equals the first 2 steps of runs/first" in printed
    assert "train/loss at step 1" in printed
    assert json.loads((here / "runs/beginning/metrics.json").read_text())["steps"] == 2


def test_a_difference_behind_a_value_that_is_nan_in_both_is_found(tmp_path: Path) -> None:
    for name, last in (("run", 1.0), ("again", 2.0)):
        with SummaryWriter(str(tmp_path / name)) as writer:
            for step, value in enumerate((math.nan, last)):
                writer.add_scalar("val/x", value, step)
    rows = list(rerun.compare_curves(tmp_path / "run", tmp_path / "again", 1))
    assert rows == [("val/x at step 1", "1.0", "2.0")]


def test_what_differs_is_named_with_what_may_explain_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = here / "runs" / "other"
    shutil.copytree(here / "runs" / "first", other)
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["seed_everything"], config["ckpt_path"] = 1, None
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    environment = json.loads((other / "environment.json").read_text())
    environment["packages"]["torch"] = "0.1.2"
    (other / "environment.json").write_text(json.dumps(environment))
    assert owl_here("rerun", "runs/other", "--name", "different", cwd=here) == 1
    printed = words(capsys)
    assert "runs/different differs from runs/other in " in printed
    assert "different │" in printed
    assert "0.1.2" in printed
    assert rerun.weight_difference(here / "runs/first", here / "runs/different") > 0
    assert owl_here("rerun", "runs/other", "--name", "briefly", "--steps", "2", cwd=here) == 1
    (other / "environment.json").unlink()
    shutil.rmtree(here / "runs" / "different")
    assert owl_here("rerun", "runs/other", "--name", "different", cwd=here) == 1
    assert "not recorded" in words(capsys)


def test_a_trial_is_repeated_without_its_sweep(here: Path) -> None:
    """Its study may have moved, and would get the progress of another trial."""
    shutil.copytree(here / "runs" / "first", here / "runs" / "trial")
    config = here / "runs" / "trial" / "config.yaml"
    content = yaml.safe_load(config.read_text())
    arguments = {"storage": str(here / "moved" / "journal.log"), "study": "lr", "trial": 3}
    pruning = {"class_path": "owl.callbacks.pruning.Pruning", "init_args": arguments}
    content["trainer"]["callbacks"] = [*(content["trainer"]["callbacks"] or []), pruning]
    content["ckpt_path"] = None
    write_config(config, content)
    assert owl_here("rerun", "runs/trial", cwd=here) == 0


def test_a_run_that_time_ended_is_repeated_by_its_plan(here: Path) -> None:
    """On a machine of another speed; here it had no last step, and turned out slower on the way."""
    clock = ("--trainer.callbacks+=tests.helpers.faults.Stopwatch", "--trainer.callbacks.seconds=[1.0]")
    slower = ("--trainer.callbacks.later", "2", "--trainer.callbacks.at", "8")
    limits = ("--trainer.max_steps", "-1", "--trainer.max_time", "00:00:00:25", "--trainer.limit_val_batches", "0")
    assert owl_here("fit", "--config", "first.yaml", "--name", "timed", *limits, *clock, *slower, cwd=here) == 0
    plan = load_checkpoint(here / "runs/timed/checkpoints/last.ckpt")["budget"]["changes"]
    assert len(plan) > 1
    config = here / "runs" / "timed" / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content["trainer"]["callbacks"][0]["init_args"]["seconds"] = [0.1]
    timer = {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"duration": "00:00:00:03"}}
    content["trainer"] |= {"max_time": None, "callbacks": [*content["trainer"]["callbacks"], timer]}
    write_config(config, content)
    assert owl_here("rerun", "runs/timed", cwd=here) == 0
    assert load_checkpoint(here / "runs/timed-again/checkpoints/last.ckpt")["budget"]["changes"] == plan


def test_weights_are_compared_to_the_last_bit(lab: Path, tmp_path: Path) -> None:
    content = torch.load(lab / "runs/first/checkpoints/last.ckpt", weights_only=True)
    name = next(iter(content["state_dict"]))

    def difference(**changed: torch.Tensor) -> float:
        path = tmp_path / "checkpoints" / "last.ckpt"
        path.parent.mkdir(exist_ok=True)
        torch.save(content | {"state_dict": content["state_dict"] | changed}, path)
        return rerun.weight_difference(lab / "runs/first", tmp_path)

    weight = content["state_dict"][name]
    assert difference() == 0
    assert difference(**{name: weight + 0.5}) == pytest.approx(0.5, rel=1e-5)
    assert 0 < difference(**{name: weight.nextafter(torch.tensor(9.0))}) < 1e-6
    assert difference(**{name: weight * torch.nan}) == float("inf")
    assert difference(more=weight) == float("inf")


@pytest.mark.parametrize(
    ("missing", "arguments", "code", "tokens"),
    [
        ("config.yaml", (), "rerun.folder", ["runs/broken/config.yaml"]),
        ("metrics.json", (), "rerun.folder", ["runs/broken/metrics.json"]),
        ("checkpoints/last.ckpt", (), "rerun.folder", ["runs/broken/checkpoints/last.ckpt"]),
        ("events.out.tfevents.*", ("--steps", "2"), "rerun.curves", ["runs/broken", "--steps"]),
        ("", ("--steps", "0"), "arguments.too-small", ["steps is 0", "at least 1"]),
        ("", ("--name", "first"), "run.exists", ["runs/first", "--name"]),
        ("", ("--name", "broken"), "run.exists", ["runs/broken", "--name"]),
    ],
)
def test_what_cannot_be_repeated_is_reported_in_one_sentence(
    here: Path, missing: str, arguments: tuple[str, ...], code: str, tokens: list[str]
) -> None:
    broken = here / "runs" / "broken"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(here / "runs" / "first", broken)
    for file in broken.glob(missing) if missing else ():
        file.unlink()
    with refused(code, *tokens):
        owl_here("rerun", "runs/broken", *arguments, cwd=here)


def test_a_failed_repetition_and_damaged_metrics_are_reported(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = SimpleNamespace(run=lambda command: subprocess.CompletedProcess(command, 3))
    monkeypatch.setattr(rerun, "subprocess", failing)
    with refused("rerun.failed", "runs/first", "status 3"):
        owl_here("rerun", "runs/first", "--name", "failed", cwd=here)
    shutil.copytree(here / "runs" / "first", here / "runs" / "damaged")
    (here / "runs" / "damaged" / "metrics.json").write_text("[1]")
    with refused("rerun.folder", "runs/damaged/metrics.json"):
        owl_here("rerun", "runs/damaged", cwd=here)
