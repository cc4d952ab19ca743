"""The average is the one that was promised, of optimiser steps, and is what validation and checkpoints see."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from owl.callbacks.ema import EMA
from tests.helpers.errors import refused
from tests.helpers.line import Line, loader, trainer


def closed_form(weights: list[float], decay: float) -> float:
    average = 1.0  # the first weight
    for n, weight in enumerate(weights, 1):
        d = min(decay, n / (n + 9))
        average = d * average + (1 - d) * weight
    return average


@pytest.mark.parametrize("decay", [0.999, 0.15])  # the second is reached within the warm-up: 0.1, 0.15, 0.15
def test_three_steps_give_the_closed_form(tmp_path: Path, decay: float) -> None:
    line, ema = Line(), EMA(decay)
    trainer(tmp_path, [ema]).fit(line, loader(3), loader(1))
    assert ema.updates == 3
    assert list(ema.average) == ["weight"]  # not the frozen one
    assert ema.average["weight"].item() == pytest.approx(closed_form(line.weights, decay), rel=1e-6)
    assert line.weight.item() == line.weights[-1]


def test_accumulated_batches_count_once(tmp_path: Path) -> None:
    line, ema = Line(), EMA()
    trainer(tmp_path, [ema], accumulate_grad_batches=2).fit(line, loader(6))
    assert len(line.weights) == 6
    assert ema.updates == 3
    assert ema.average["weight"].item() == pytest.approx(closed_form(line.weights[1::2], 0.999), rel=1e-6)


def test_a_resumed_accumulation_counts_once(tmp_path: Path) -> None:
    first = trainer(tmp_path, [EMA()], accumulate_grad_batches=2, max_steps=2)
    first.fit(Line(), loader(8))
    first.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    line, ema = Line(), EMA()
    resumed = trainer(tmp_path, [ema], accumulate_grad_batches=2, max_steps=4)
    resumed.fit(line, loader(8), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    steps = len(line.weights) // 2
    assert resumed.global_step == 4
    assert steps == 2
    assert ema.updates == 4


def test_validation_and_checkpoints_see_the_average(tmp_path: Path) -> None:
    line, ema = Line(), EMA()
    run = trainer(tmp_path, [ema])
    run.fit(line, loader(3), loader(1))
    average = ema.average["weight"].item()
    assert line.validated == [average]
    assert average != line.weight.item()
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert stored["state_dict"]["weight"].item() == average
    assert stored["ema"] == {"raw": {"weight": line.weight.data}, "updates": 3}
    for command in ("validate", "test"):
        measured = Line()
        measured.test_step = measured.validation_step
        getattr(trainer(tmp_path, [EMA()]), command)(
            measured, loader(1), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False
        )
        assert measured.validated == [average], command


class SaveInValidation(Callback):
    def on_validation_batch_end(self, run, *arguments) -> None:
        run.save_checkpoint(Path(run.default_root_dir) / "amid.ckpt", weights_only=False)


def test_a_checkpoint_during_validation_holds_the_same(tmp_path: Path) -> None:
    line, ema = Line(), EMA()
    trainer(tmp_path, [ema, SaveInValidation()]).fit(line, loader(3), loader(1))
    stored = torch.load(tmp_path / "amid.ckpt", weights_only=True)
    assert stored["state_dict"]["weight"].item() == ema.average["weight"].item()
    assert stored["ema"]["raw"]["weight"].item() == line.weight.item() == line.weights[-1]


def test_the_weights_are_swapped_back_after_an_exception(tmp_path: Path) -> None:
    line, ema = Line(), EMA()
    line.fail_in_validation = True
    with pytest.raises(ArithmeticError):
        trainer(tmp_path, [ema]).fit(line, loader(3), loader(1))
    assert line.weight.item() == line.weights[-1]
    assert ema.average["weight"].item() == pytest.approx(closed_form(line.weights, 0.999), rel=1e-6)


def test_without_a_decay_nothing_is_averaged_and_a_resumed_run_trains_its_raw_weights(tmp_path: Path) -> None:
    line, ema = Line(), EMA(0)
    run = trainer(tmp_path, [ema])
    run.fit(line, loader(3), loader(1))
    assert not ema.average
    assert line.validated == [line.weight.item()]
    run = trainer(tmp_path, [EMA()])
    run.fit(line, loader(3))
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    resumed = Line()
    trainer(tmp_path, [EMA(0)]).fit(resumed, loader(3), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert resumed.weight.item() == line.weight.item()


def test_a_decay_out_of_range_is_reported() -> None:
    with refused("ema.decay", "ema.decay is 1.0", "[0, 1)"):
        EMA(1.0)
