"""The progress bar of training."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

REDRAWN_PER_SECOND = 5  # Lightning's default of 100 slows down training on a CPU


class Progress(RichProgressBar):
    """Progress bar per epoch, which also shows the number of completed steps.

    It is closed before the report prints its table.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=REDRAWN_PER_SECOND)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the logged metrics, after the step."""
        limit = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return {"step": f"{trainer.global_step}{limit}"} | items

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar of training."""
        self._stop_progress()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar of validation, unless it is part of training."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != "fit":
            self._stop_progress()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar of testing."""
        super().on_test_end(trainer, pl_module)
        self._stop_progress()

    def _get_train_description(self, current_epoch: int) -> str:
        """Omit the number of epochs if training ends at a step, where Lightning shows -2."""
        return super()._get_train_description(current_epoch).replace("/-2", "")
