"""last.ckpt in its interval and before validations, best.ckpt by its metric, files that are whole."""

import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from owl.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from owl.callbacks.media import Media
from owl.callbacks.report import Report
from owl.checkpoint import load_checkpoint
from owl.errors import OwlError
from tests.helpers.errors import refused
from tests.helpers.line import Line, loader, trainer


class Scored(Line):
    """Validations give 3, 1, 2, 0, ..."""

    scores = (3.0, 1.0, 2.0, 0.0)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("val/score", self.scores[len(self.validated)])
        self.validated.append(self.trainer.global_step)


class Watch(Callback):
    """Notes the steps at which each file is written."""

    def __init__(self) -> None:
        self.saves: dict[str, list[int]] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        save = trainer.save_checkpoint

        def note(path: Path, **options: Any) -> None:
            self.saves.setdefault(Path(path).name, []).append(trainer.global_step)
            save(path, **options)

        trainer.save_checkpoint = note


def fit(folder: Path, checkpoint: Checkpoint, ckpt_path: Path | None = None, **options: Any) -> dict[str, list[int]]:
    watch = Watch()
    run = trainer(folder, [Report(), watch, checkpoint], plugins=[AtomicCheckpointIO()], **options)
    run.fit(Scored(), loader(6), loader(1), ckpt_path=ckpt_path, weights_only=True)
    return watch.saves


@pytest.mark.parametrize(("mode", "saved"), [("min", [2, 4, 8]), ("max", [2])])
def test_best_is_the_best_by_its_metric(tmp_path: Path, mode: Any, saved: list[int]) -> None:
    checkpoint = Checkpoint(monitor="val/score", mode=mode)
    validate_every_2 = {"val_check_interval": 2, "check_val_every_n_epoch": None, "max_steps": 8}
    assert fit(tmp_path, checkpoint, **validate_every_2)["best.ckpt"] == saved
    best = load_checkpoint(tmp_path / "checkpoints" / "best.ckpt")
    assert best["global_step"] == saved[-1]
    assert checkpoint.best == {"min": 0.0, "max": 3.0}[mode]


def test_last_is_written_in_its_interval_before_validations_and_at_the_end(tmp_path: Path) -> None:
    saves = fit(tmp_path, Checkpoint(every_n_steps=4), max_steps=10, val_check_interval=3)
    assert saves == {"last.ckpt": [3, 4, 6, 8, 9, 10]}
    assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 10


def test_a_last_step_between_validations_is_validated(tmp_path: Path) -> None:
    line = Scored()
    run = trainer(tmp_path, [Report(), Checkpoint()], max_steps=4, val_check_interval=3)
    run.fit(line, loader(6), loader(1))
    assert line.validated == [3, 4]


def test_the_best_value_survives_a_resume(tmp_path: Path) -> None:
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    fit(tmp_path, Checkpoint(monitor="val/score"), max_steps=4, **options)  # 3, 1
    resumed = Checkpoint(monitor="val/score")
    saves = fit(tmp_path, resumed, tmp_path / "checkpoints" / "last.ckpt", max_steps=6, **options)  # 3
    assert "best.ckpt" not in saves
    assert resumed.best == 1


def test_an_unknown_metric_is_reported(tmp_path: Path) -> None:
    with refused("checkpoint.monitor", "'val/psmr'", "train/loss, val/score"):
        fit(tmp_path, Checkpoint(monitor="val/psmr"))


def test_intervals_that_are_none_are_refused() -> None:
    with refused("arguments.too-small", "checkpoint.every_n_steps is 0", "at least 1"):
        Checkpoint(every_n_steps=0)
    with refused("arguments.too-small", "media.every_n_validations is -1", "at least 0"):
        Media(every_n_validations=-1)


def test_accumulation_is_never_cut(tmp_path: Path) -> None:
    saves = fit(tmp_path, Checkpoint(every_n_steps=1), max_steps=3, accumulate_grad_batches=2, val_check_interval=3)
    assert saves == {"last.ckpt": [1, 2, 3]}


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"owl": {}, "state_dict": {}, "code": print}, tmp_path / "evil.ckpt")
    with pytest.raises(OwlError) as caught:
        load_checkpoint(tmp_path / "evil.ckpt")
    assert caught.value.code == "checkpoint.unreadable"
    assert "weights_only" not in str(caught.value)  # PyTorch's advice is to run the code


@pytest.mark.parametrize(
    ("signals", "status"),
    [(["SIGUSR1", "SIGTERM"], 138), (["SIGTERM", "SIGUSR1"], 138), (["SIGTERM"], 143), (["SIGINT", "SIGTERM"], 143)],
)
def test_an_expired_time_limit_keeps_its_exit_status(signals: list[str], status: int) -> None:
    """Clusters announce the end by SIGUSR1, and may end the job by SIGTERM while it saves."""
    checkpoint = Checkpoint()
    for name in signals:
        checkpoint._on_signal(signal.Signals[name], None)
    assert checkpoint.exit_status == status


def test_checkpoints_are_written_to_remote_storage_and_new_folders(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    content = {"owl": {}, "state_dict": {"weight": torch.ones(2)}}
    for path in ("memory://run/a.ckpt", tmp_path / "deep" / "a.ckpt"):
        io.save_checkpoint(content, path)
        assert torch.equal(io.load_checkpoint(path)["state_dict"]["weight"], torch.ones(2))
        io.remove_checkpoint(path)
        with refused("checkpoint.missing", str(path)):
            io.load_checkpoint(path)


def resident(least: int) -> list[int]:
    """Bytes in memory of every file that is mapped and at least so large, libraries aside."""
    maps = psutil.Process().memory_maps(grouped=False)
    return [part.rss for part in maps if part.path[0] == "/" and ".so" not in part.path and part.size >= least]


def test_only_what_is_used_of_a_checkpoint_is_read(tmp_path: Path) -> None:
    size = 64 << 20
    values = torch.empty(size, dtype=torch.uint8)
    values[::4096] = 1
    for path in (tmp_path / "a.ckpt", "memory://mapped/a.ckpt"):
        AtomicCheckpointIO().save_checkpoint({"owl": {}, "state_dict": {"large": values}}, path)
        large = load_checkpoint(path)["state_dict"]["large"]
        AtomicCheckpointIO().save_checkpoint({"owl": {}, "state_dict": {}}, path)  # the file it is mapped from is gone
        assert large[: 100 * 4096 : 4096].eq(1).all()
        (read,) = resident(size)
        assert 100 * 4096 <= read < size // 8
        assert large[::4096].eq(1).all()
        del large
        assert not resident(size)


def test_a_file_that_is_torn_or_none_of_ours_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"owl": {}, "state_dict": {"weight": torch.ones(1000)}}, path)
    whole = path.read_bytes()
    other = {"half": whole[: len(whole) // 2], "empty": b"", "text": b"no checkpoint", "zeros": bytes(1000)}
    for content in other.values():
        path.write_bytes(content)
        with refused("checkpoint.unreadable", str(path)):
            load_checkpoint(path)
    torch.save({"owl": {}, "state_dict": {}}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(OwlError) as caught:
        load_checkpoint(path)
    assert caught.value.code == "checkpoint.unreadable"
    assert "torch.load" not in str(caught.value)  # which is what PyTorch advises
    torch.save({"weight": torch.ones(1)}, path)
    with refused("checkpoint.foreign", str(path)):
        load_checkpoint(path)
