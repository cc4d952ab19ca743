"""Losses are logged at the steps that reach a logger and at the last one, and nowhere else."""

from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from owl.recipes.logging import log_losses
from tests.helpers.line import Line, loader, trainer


class Logging(Line):
    """Counts how often it was asked to log a loss."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = (self.weight * batch["x"]).square().mean()
        self.weights.append(loss.item())
        log_losses(self, loss, {"half": loss / 2})
        return loss

    def log(self, name: str, value: Tensor, **options: bool) -> None:
        self.draws.append(self.trainer.global_step)
        super().log(name, value, **options)

    def on_train_batch_end(self, *arguments: object) -> None:
        """Keep the losses in ``weights``."""


@pytest.mark.parametrize(("accumulate", "due", "written"), [(1, [2, 5, 6], [2, 5]), (2, [2, 2, 5, 5, 6, 6], [2, 5])])
def test_losses_are_logged_when_they_are_due(
    tmp_path: Path, accumulate: int, due: list[int], written: list[int]
) -> None:
    line = Logging()
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer(
        tmp_path,
        [],
        logger=logger,
        max_steps=7,
        log_every_n_steps=3,
        accumulate_grad_batches=accumulate,
        enable_progress_bar=False,
    )
    run.fit(line, loader(14))
    assert line.draws == [step for step in due for _ in range(2)]  # the loss and its one term
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    steps = rows[0].split(",").index("step")
    assert [int(row.split(",")[steps]) for row in rows[1:]] == written
    assert run.callback_metrics["train/loss"].item() == pytest.approx(line.weights[-1])
    assert run.callback_metrics["train/half"].item() == pytest.approx(line.weights[-1] / 2)
