"""End a run where another one ended."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StopAt(Callback):
    """Ends training after an optimiser step, as reaching a time limit there would.

    ``trainer.max_steps`` would also shorten the learning rate's schedule.

    Args:
        step: The last one.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look whether it is time."""
        if trainer.global_step >= self.step:
            trainer.should_stop = True
