"""Stop a run at a given step."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StopAt(Callback):
    """Stop training after an optimiser step, as a time limit would.

    In contrast, ``trainer.max_steps`` also shortens the learning rate schedule.

    Args:
        step: The last step.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after the last step."""
        if trainer.global_step >= self.step:
            trainer.should_stop = True
