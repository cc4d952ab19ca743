"""The progress bar counts steps, whether or not epochs are limited."""

from pathlib import Path

import pytest

from owl.callbacks.progress import Progress
from tests.helpers.line import Line, loader, trainer


@pytest.mark.parametrize(
    ("limits", "step", "epoch"),
    [({"max_steps": 5, "max_epochs": -1}, "5/5", "Epoch 1"), ({"max_steps": -1, "max_epochs": 2}, "6", "Epoch 1/1")],
)
def test_the_bar_says_how_far_training_is(
    tmp_path: Path, limits: dict[str, int], step: str, epoch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = Progress()
    run = trainer(tmp_path, [bar], enable_progress_bar=True, **limits)
    run.fit(Line(), loader(3))
    assert next(iter(bar.get_metrics(run, run.lightning_module).items())) == ("step", step)
    assert bar._get_train_description(1).strip() == epoch
    assert "-2" not in capsys.readouterr().out
