"""What users trust: runs continue exactly, checkpoints are whole, two processes do what one does."""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from owl.__main__ import main
from tests.helpers.autoencoders import save_autoencoder, tiny_gan_decoder
from tests.helpers.errors import check_line
from tests.helpers.lab import VALUE, checkpoint, demanding, fit, make_lab
from tests.helpers.latents import dot_experiment, make_latents
from tests.helpers.players import tiny_players
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import in_child, owl, tiny_inverse_dynamics, write_config

UNREPEATABLE = {"seconds", "data_wait"}  # the clock's


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums come out the same only on equally many threads, and forked children have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lab(tmp_path_factory.mktemp("trust"))


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    """Bit for bit, naming what differs."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_equal(a, b, f"{where}.{number}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


def state(lab: Path, name: str) -> VALUE:
    """Everything of a finished run that must not depend on its interruptions."""
    content = checkpoint(lab, name)
    metrics = {key: value for key, value in content["owl"]["metrics"].items() if key not in UNREPEATABLE}
    written = json.loads((lab / "runs" / name / "metrics.json").read_text())
    assert {key: value for key, value in written.items() if key not in UNREPEATABLE} == metrics
    loops = content["loops"]["fit_loop"]
    keys = ("state_dict", "ema", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    return {
        **{key: content[key] for key in keys},
        "metrics": metrics,
        "loader": loops["state_dict"],
        "epochs": loops["epoch_progress"],
        "batches": loops["epoch_loop.batch_progress"],
        "curves": curves(lab / "runs" / name),
    }


def curves(run: Path) -> dict[tuple[str, int], float]:
    """Every scalar in TensorBoard by name and step; what was logged twice must agree."""
    found: dict[tuple[str, int], float] = {}
    for file in run.glob("events.out.tfevents.*"):
        events = EventAccumulator(str(file), {"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                # an epoch's last validation, made up for by a resumed run, is logged under the next epoch's number
                if tag != "epoch" and not tag.startswith("speed/"):
                    assert found.setdefault((tag, event.step), event.value) == event.value, (tag, event.step)
    return found


def assert_same_run(found: VALUE, expected: VALUE, killed: bool = False) -> None:
    """Everything is the same; a kill takes with it what training logged since its checkpoint."""
    if killed:
        assert found["curves"].items() <= expected["curves"].items()
        lost = expected["curves"].keys() - found["curves"].keys()
        assert {tag for tag, _ in lost} <= {"train/loss", "train/l1", "train/kl"}
        assert len({step for _, step in lost}) <= 2
        found = {**found, "curves": expected["curves"]}
    assert_equal(found, expected)


@pytest.fixture(scope="module")
def uninterrupted(lab: Path) -> VALUE:
    assert fit(lab, "uninterrupted", config="full.yaml") == 0
    return state(lab, "uninterrupted")


def interrupt(lab: Path, name: str, signal_name: str, hook: str, call: int, *options: str) -> int:
    """Start or continue a run that gets a signal at the n-th call of a hook; return its status."""
    faults = ["--trainer.callbacks+=tests.helpers.faults.SendSignal"]
    for key, value in {"signal": signal_name, "hook": hook, "call": call}.items():
        faults += [f"--trainer.callbacks.{key}", str(value)]

    def run() -> int:
        return fit(lab, name, "--ckpt_path", "last", *faults, *options, config="full.yaml")

    return in_child(run) if signal_name == "SIGKILL" else run()


# Where in the run's 16 batches it is interrupted, counted again after each resume.
INTERRUPTIONS = {
    "between the two halves of a step": [("SIGTERM", "on_train_batch_end", 1)],
    "when a validation is due": [("SIGTERM", "on_train_batch_end", 4)],
    "at the end of an epoch, of the next, and within the third": [
        ("SIGTERM", "on_train_batch_end", 6),
        ("SIGTERM", "on_train_batch_end", 6),
        ("SIGTERM", "on_train_batch_end", 1),
    ],
    "during the first validation, and its repetition, and the next": [
        ("SIGTERM", "on_validation_batch_end", 1),
        ("SIGTERM", "on_validation_batch_start", 1),
        ("SIGTERM", "on_validation_batch_end", 3),
    ],
    "killed during validation, killed within a step": [
        ("SIGKILL", "on_validation_batch_end", 2),
        ("SIGKILL", "on_before_optimizer_step", 3),
    ],
    "terminated during the last validation": [("SIGTERM", "on_validation_batch_end", 7)],
    "warned by a cluster that time runs out": [
        ("SIGUSR1", "on_train_batch_end", 3),
        ("SIGUSR1", "on_validation_batch_end", 1),
    ],
    "stopped by the user": [("SIGINT", "on_train_batch_start", 4), ("SIGINT", "on_validation_batch_end", 2)],
}


@pytest.mark.parametrize("where", INTERRUPTIONS)
def test_an_interrupted_run_equals_the_uninterrupted_one(lab: Path, uninterrupted: VALUE, where: str) -> None:
    name = where.replace(" ", "-")
    for signal_name, hook, call in INTERRUPTIONS[where]:
        status = interrupt(lab, name, signal_name, hook, call)
        finishing = where == "terminated during the last validation"
        expected = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 0 if finishing else 143, "SIGUSR1": 138, "SIGINT": 130}
        assert status == expected[signal_name]
    assert fit(lab, name, "--ckpt_path", "last", config="full.yaml") == 0
    assert_same_run(state(lab, name), uninterrupted, killed="killed" in where)


# Every other recipe, each on 24 windows.
RECIPES: dict[str, Callable[[Path], VALUE]] = {
    "inverse_dynamics": lambda data: tiny_inverse_dynamics(make_dataset(data, 4, 15, (32, 48), ("rgb", "controls"))),
    "two_optimizers": lambda data: tiny_players(make_dataset(data, 4, 12, (32, 48), ("rgb",)), penalty=0.1),
    "cadence": lambda data: tiny_players(make_dataset(data, 4, 12, (32, 48), ("rgb",)), generator_every=3),
    "gan_decoder": lambda data: tiny_gan_decoder(
        make_dataset(data, 4, 12, (32, 48), ("rgb",)), save_autoencoder(data.parent / "autoencoder")
    ),
    "world_model": lambda data: dot_experiment(make_latents(data, (16, 16, 12, 12))),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_continues_where_it_was_interrupted(tmp_path: Path, recipe: str) -> None:
    write_config(tmp_path / "full.yaml", demanding(RECIPES[recipe](tmp_path / "data")))
    assert fit(tmp_path, "whole", config="full.yaml") == 0
    for call in (1, 7):  # between the two halves of a step, and in the second epoch
        assert interrupt(tmp_path, "parts", "SIGTERM", "on_train_batch_end", call) == 143
    assert fit(tmp_path, "parts", "--ckpt_path", "last", config="full.yaml") == 0
    assert_same_run(state(tmp_path, "parts"), state(tmp_path, "whole"))


def test_loader_workers_change_nothing_and_lose_nothing(lab: Path, uninterrupted: VALUE) -> None:
    workers = ("--data.num_workers", "2")
    assert interrupt(lab, "workers", "SIGTERM", "on_train_batch_end", 5, *workers) == 143
    assert interrupt(lab, "workers", "SIGKILL", "on_train_batch_end", 6, *workers) == -signal.SIGKILL
    assert fit(lab, "workers", "--ckpt_path", "last", *workers, config="full.yaml") == 0
    assert_same_run(state(lab, "workers"), uninterrupted, killed=True)


def test_sigterm_to_a_real_process_saves_and_exits_with_143(lab: Path, uninterrupted: VALUE) -> None:
    options = [
        "--trainer.callbacks+=tests.helpers.faults.SendSignal",
        "--trainer.callbacks.signal=SIGTERM",
        "--trainer.callbacks.hook=on_train_batch_start",
        "--trainer.callbacks.call=3",
    ]
    finished = owl("fit", "--config", "full.yaml", "--name", "process", *options, cwd=lab, check=False)
    assert finished.returncode == 143, finished.stderr
    assert "Traceback" not in finished.stderr
    assert checkpoint(lab, "process")["global_step"] == 2
    assert fit(lab, "process", "--ckpt_path", "last", config="full.yaml") == 0
    assert_same_run(state(lab, "process"), uninterrupted)


def test_a_sigterm_to_all_processes_leaves_training_its_loader(lab: Path) -> None:
    """As job schedulers send it; to this very process only a whole epoch later."""
    faults = ["--trainer.callbacks+=tests.helpers.faults.SignalWorkers", "--trainer.callbacks.signal=SIGTERM"]
    faults += ["--trainer.callbacks.step=2", "--trainer.callbacks+=tests.helpers.faults.SendSignal"]
    faults += [f"--trainer.callbacks.{key}" for key in ("signal=SIGTERM", "hook=on_train_batch_start", "call=9")]
    options = ["--data.num_workers", "2", "--checkpoint.every_n_steps", "100", *faults]
    assert fit(lab, "scheduler", *options, "--trainer.max_steps", "12") == 143
    assert checkpoint(lab, "scheduler")["global_step"] == 9


def test_a_finished_run_is_not_changed_and_can_be_extended(
    lab: Path, uninterrupted: VALUE, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = ("--model.warmup_steps", "0", "--model.final_lr", "1")
    assert fit(lab, "longer", *constant, config="full.yaml") == 0
    assert fit(lab, "shorter", *constant, "--trainer.max_steps", "4", config="full.yaml") == 0
    before = state(lab, "shorter")
    files = {path: path.read_bytes() for path in (lab / "runs" / "shorter").rglob("*.*") if "media" in str(path)}
    capsys.readouterr()
    for _ in range(2):
        assert (
            fit(lab, "shorter", *constant, "--trainer.max_steps", "4", "--ckpt_path", "last", config="full.yaml") == 0
        )
    printed = capsys.readouterr().out
    assert "already finished" in printed
    assert "val/psnr" in printed
    assert_equal(state(lab, "shorter"), before)
    assert {path: path.read_bytes() for path in files} == files
    assert "![reconstruction]" in (lab / "runs" / "shorter" / "report.md").read_text()
    assert fit(lab, "shorter", *constant, "--ckpt_path", "last", config="full.yaml") == 0
    # the validation at the former end is one more than the longer run had
    longer, extended = state(lab, "longer"), state(lab, "shorter")
    assert longer["curves"].items() <= extended["curves"].items()
    assert_equal({**extended, "curves": None}, {**longer, "curves": None})


def main_in_child(lab: Path, arguments: list[str], errors: Path, before: Callable[[], None] | None = None) -> int:
    """Run a command as users do, in a forked process; what it says to stderr goes to a file."""

    def run() -> int:
        with open(errors, "w", buffering=1) as file, open(os.devnull, "w") as nowhere:
            sys.stderr, sys.stdout, sys.argv = file, nowhere, ["owl", *arguments]
            os.chdir(lab)
            if before is not None:
                before()
            try:
                main()
            except SystemExit as exit_:
                return int(exit_.code or 0)
        return 0

    return in_child(run)


def test_kill_during_a_save_leaves_the_previous_checkpoint(lab: Path) -> None:
    def die_during_the_second_save() -> int:
        whole, saves = torch.save, []

        def save(content: VALUE, file: Any) -> None:
            saves.append(content)
            if len(saves) == 2:
                file.write(b"half of it")
                file.flush()
                signal.raise_signal(signal.SIGKILL)
            whole(content, file)

        torch.save = save
        return fit(lab, "torn", "--checkpoint.every_n_steps", "1")

    assert in_child(die_during_the_second_save) == -signal.SIGKILL
    folder = lab / "runs" / "torn" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "last.ckpt.partial"]
    assert checkpoint(lab, "torn")["global_step"] == 1
    assert fit(lab, "torn", "--ckpt_path", "last") == 0
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    assert checkpoint(lab, "torn")["global_step"] == 4


def test_a_full_disk_is_reported_and_leaves_the_previous_checkpoint(lab: Path, tmp_path: Path) -> None:
    assert fit(lab, "full", "--trainer.max_steps", "1") == 0
    path = lab / "runs" / "full" / "checkpoints" / "last.ckpt"
    before = path.read_bytes()

    def fill_up() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    arguments = ["fit", "--config", "tiny.yaml", "--name", "full", "--ckpt_path", "last"]
    assert main_in_child(lab, [*arguments, "--checkpoint.every_n_steps=1"], tmp_path / "stderr", fill_up) == 2
    (line,) = (tmp_path / "stderr").read_text().splitlines()
    check_line(line, "checkpoint.unwritable", "last.ckpt", "File too large", "--ckpt_path last")
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_two_processes_of_batch_4_equal_one_of_batch_8(lab: Path) -> None:
    options = ["--trainer.max_steps", "4", "--model.sample", "false", "--data.validation_windows", "7"]
    options += ["--trainer.callbacks+=tests.helpers.faults.WindowLog"]
    runs = {"one": ["--data.batch_size", "8"], "two": ["--trainer.devices", "2", "--trainer.strategy", "ddp"]}
    logs = {}
    for name, more in runs.items():
        folder = lab / name
        folder.mkdir()
        arguments = [*options, f"--trainer.callbacks.folder={folder}", *more]
        if name == "one":
            assert fit(lab, name, *arguments) == 0
        else:
            owl("fit", "--config", "tiny.yaml", "--name", name, *arguments, cwd=lab)
        logs[name] = [
            [list(map(int, line.split())) for line in file.read_text().splitlines()]
            for file in sorted(folder.iterdir())
        ]
    assert len(logs["two"]) == 2
    together = [first + second[1:] for first, second in zip(*logs["two"], strict=True)]
    assert together == logs["one"][0]
    epoch = [window for entry in together if entry[0] == 0 for window in entry[1:]]
    assert sorted(epoch) == list(range(24))  # each sample once
    one, two = (checkpoint(lab, name) for name in runs)
    for part in ("state_dict", "ema"):  # the averaged weights with the latents' statistics, and the raw ones
        tensors = (one[part], two[part]) if part == "state_dict" else (one["ema"]["raw"], two["ema"]["raw"])
        torch.testing.assert_close(*reversed(tensors), atol=1e-5, rtol=1e-5)
    assert one["ema"]["updates"] == two["ema"]["updates"] == 4
    assert two["state_dict"]["network.latent_std"].ne(1).all()
    metrics = {name: json.loads((lab / "runs" / name / "metrics.json").read_text()) for name in runs}
    validated = [key for key in metrics["one"] if key.startswith("val/")]
    assert len(validated) >= 9
    for key in validated:
        assert metrics["two"][key] == pytest.approx(metrics["one"][key], rel=1e-4, abs=1e-5), key


def test_the_seed_decides_what_is_seen_and_drawn(lab: Path) -> None:
    logs = {}
    for name, seed in {"one": 1, "again": 1, "two": 2}.items():
        folder = lab / f"seeded-{name}"
        folder.mkdir()
        options = ["--trainer.callbacks+=tests.helpers.faults.WindowLog", f"--trainer.callbacks.folder={folder}"]
        assert fit(lab, folder.name, "--seed_everything", str(seed), *options) == 0
        (log,) = folder.iterdir()
        logs[name] = log.read_text()
        assert json.loads((lab / "runs" / folder.name / "metrics.json").read_text())["seed"] == seed
    assert logs["one"] == logs["again"] != logs["two"]
    assert_equal(state(lab, "seeded-again"), state(lab, "seeded-one"))


def test_accumulating_4_batches_equals_a_batch_of_4_times_the_size(lab: Path) -> None:
    options = ("--model.sample", "false", "--trainer.max_steps", "2", "--trainer.gradient_clip_val", "0.5")
    assert fit(lab, "large", *options, "--data.batch_size", "8") == 0
    assert fit(lab, "accumulated", *options, "--data.batch_size", "2", "--trainer.accumulate_grad_batches", "4") == 0
    large, accumulated = checkpoint(lab, "large"), checkpoint(lab, "accumulated")
    for key in ("state_dict", "ema"):
        torch.testing.assert_close(accumulated[key], large[key], atol=1e-5, rtol=1e-5)
    assert large["global_step"] == accumulated["global_step"] == 2


def test_a_second_ctrl_c_stops_immediately_without_a_traceback(lab: Path, tmp_path: Path) -> None:
    options = ["--trainer.callbacks+=tests.helpers.faults.SendSignal", "--trainer.callbacks.signal=SIGINT"]
    options += ["--trainer.callbacks.hook=on_train_batch_start", "--trainer.callbacks.call=1"]
    options += ["--trainer.callbacks.times=2"]
    arguments = ["fit", "--config", "tiny.yaml", "--name", "interrupted", *options]
    assert main_in_child(lab, arguments, tmp_path / "stderr") == 130
    assert (tmp_path / "stderr").read_text() == "owl: interrupted\n"
