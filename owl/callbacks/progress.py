"""The progress bar of training."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

SECONDS_BETWEEN_LOOKS = 0.2


class Progress(RichProgressBar):
    """A bar for each epoch, as Lightning's, which also shows how many of all steps are done.

    It moves a few times a second instead of at every step, of which that would take its share.
    """

    def __init__(self) -> None:
        super().__init__()
        self._moved = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move when it is time to, and at the end."""
        now = time.monotonic()
        last = trainer.is_last_batch or trainer.global_step >= trainer.max_steps > 0
        if last or now - self._moved > SECONDS_BETWEEN_LOOKS:
            self._moved = now
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The logged metrics behind the step."""
        limit = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return {"step": f"{trainer.global_step}{limit}"} | items

    def _get_train_description(self, current_epoch: int) -> str:
        """Without a number of epochs where training ends at a step: Lightning calls it -2 then."""
        return super()._get_train_description(current_epoch).replace("/-2", "")
