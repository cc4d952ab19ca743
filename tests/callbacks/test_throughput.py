"""Speeds are those of the clock, without validation and checkpoints."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from owl.callbacks import throughput
from owl.callbacks.throughput import Throughput, samples_in
from tests.helpers.line import Line, loader, trainer


class Clock:
    """Time that passes only on request."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


class Notes(CSVLogger):
    """Keeps what it is given."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.notes: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.notes.append((step, metrics))


class Slow(Line):
    """A step takes 2 seconds, a validation 50."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.clock.now += 2
        return super().training_step(batch, index)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.clock.now += 50


class SlowLoader(Callback):
    """Every batch comes half a second late, every checkpoint takes 70 seconds."""

    def __init__(self, clock: Clock, folder: Path) -> None:
        self.clock, self.folder = clock, folder

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        fetch = trainer.fit_loop.epoch_loop._on_after_fetch

        def late() -> None:
            self.clock.now += 0.5
            fetch()

        trainer.fit_loop.epoch_loop._on_after_fetch = late

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        trainer.save_checkpoint(self.folder / "a.ckpt", weights_only=False) if trainer.global_step == 3 else None

    def on_save_checkpoint(self, *arguments: Any) -> None:
        self.clock.now += 70


def test_steps_samples_and_the_wait_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, logger = Clock(), Notes(tmp_path)
    monkeypatch.setattr(throughput, "time", clock)
    measured = Throughput()
    options = {"max_steps": 8, "log_every_n_steps": 4, "logger": logger, "val_check_interval": 2}
    callbacks = [measured, SlowLoader(clock, tmp_path)]
    trainer(tmp_path, callbacks, **options).fit(Slow(clock), loader(16, batch_size=2), loader(1))
    speeds = [(step, values) for step, values in logger.notes if "speed/data_wait" in values]
    assert [step for step, _ in speeds] == [4, 8]
    # 4 steps of 2 s; the waits after validations (steps 2 and 4) and after the checkpoint (step 3) do not count
    (_, first), (_, second) = speeds
    assert first["speed/steps_per_second"] == pytest.approx(4 / 8.5)
    assert first["speed/samples_per_second"] == pytest.approx(8 / 8.5)
    assert first["speed/data_wait"] == pytest.approx(0.5 / 8.5)
    assert second["speed/steps_per_second"] == pytest.approx(4 / 9)
    assert measured.step_seconds == pytest.approx(16)
    assert measured.wait_seconds == pytest.approx(1.5)


@pytest.mark.parametrize(("accumulate", "batches", "taken"), [(1, 3, 4), (2, 6, 8), (2, 5, 7)])
def test_steps_are_counted_over_short_epochs_and_accumulated_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int, batches: int, taken: int
) -> None:
    """Four steps take 4, 8 or, where every third step is of an epoch's last batch alone, 7 batches of 2 seconds."""
    clock, logger = Clock(), Notes(tmp_path)
    monkeypatch.setattr(throughput, "time", clock)
    options = {"max_steps": 8, "log_every_n_steps": 4, "logger": logger, "accumulate_grad_batches": accumulate}
    run = trainer(tmp_path, [Throughput()], **options)
    run.fit(Slow(clock), loader(batches))
    speeds = [(step, values) for step, values in logger.notes if "speed/data_wait" in values]
    assert [step for step, _ in speeds] == [4, 8]
    for _, values in speeds:
        assert values["speed/steps_per_second"] == pytest.approx(4 / (2 * taken))
        assert values["speed/samples_per_second"] == pytest.approx(0.5)


def test_the_real_clock_gives_sane_numbers(tmp_path: Path) -> None:
    logger = Notes(tmp_path)
    begin = time.perf_counter()
    measured = Throughput()
    trainer(tmp_path, [measured], max_steps=4, log_every_n_steps=2, logger=logger).fit(Line(), loader(4))
    seconds = time.perf_counter() - begin
    speeds = [values for _, values in logger.notes if "speed/data_wait" in values]
    assert len(speeds) == 2
    for values in speeds:
        assert 0 <= values["speed/data_wait"] < 1
        assert values["speed/steps_per_second"] >= 2 / seconds
        assert values["speed/samples_per_second"] == values["speed/steps_per_second"]
    assert 0 < measured.step_seconds + measured.wait_seconds < seconds


def test_samples_are_counted_in_whatever_holds_them() -> None:
    x = torch.zeros(3, 2)
    for batch in (x, [x, torch.zeros(9)], (x,), {"names": ["a", "b"], "x": x}, [torch.tensor(1.0), {"deep": (x,)}]):
        assert samples_in(batch) == 3
    assert samples_in({"names": ["a", "b"]}) == 0
