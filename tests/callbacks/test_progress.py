"""The progress bar counts steps, whether or not epochs are limited, and does not move at each of them."""

from pathlib import Path

import pytest

from owl.callbacks import progress
from owl.callbacks.progress import Progress
from tests.helpers.line import Line, loader, trainer


@pytest.mark.parametrize(
    ("limits", "step", "epoch", "moves"),
    [
        ({"max_steps": 5, "max_epochs": -1}, "5/5", "Epoch 1", [1, 3, 2]),
        ({"max_steps": -1, "max_epochs": 2}, "6", "Epoch 1/1", [1, 3, 3]),
    ],
)
def test_the_bar_says_how_far_training_is(
    tmp_path: Path,
    limits: dict[str, int],
    step: str,
    epoch: str,
    moves: list[int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LOOKS", 1000.0)  # only the first step and the last ones are due
    bar, seen = Progress(), []
    bar._moved = -1e9
    monkeypatch.setattr(bar, "_update", lambda number, current, **_: seen.append(current))
    run = trainer(tmp_path, [bar], enable_progress_bar=True, **limits)
    run.fit(Line(), loader(3))
    assert next(iter(bar.get_metrics(run, run.lightning_module).items())) == ("step", step)
    assert bar._get_train_description(1).strip() == epoch
    assert seen == moves  # within each epoch of three batches
    assert "-2" not in capsys.readouterr().out
