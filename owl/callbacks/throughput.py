"""Measure the speed of training and the time spent waiting for data."""

import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils._pytree import tree_leaves

SECONDS_BETWEEN_LINES = 30.0


class Throughput(Callback):
    """Log ``speed/steps_per_second``, ``speed/samples_per_second`` and ``speed/data_wait`` at the logging interval.

    ``data_wait`` is the share of the time between the end of a step and the start of the next: an upper bound of the
    time spent waiting for the loader, since it includes the trainer's overhead. Validation and checkpoints are
    excluded. On a GPU, steps are queued asynchronously, so a wait is visible only when the queue runs empty.
    """

    def __init__(self) -> None:
        self._reset()
        self.step_seconds = 0.0
        self.wait_seconds = 0.0
        self._global_step = 0
        self._printed = -SECONDS_BETWEEN_LINES

    def _reset(self) -> None:
        self._start: float = 0.0
        self._end: float | None = None
        self._steps = self._samples = 0
        self._interval_busy = self._interval_wait = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the measurements."""
        self._reset()
        self._global_step = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exclude validation from the measurements."""
        self._end = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Exclude checkpoints from the measurements."""
        self._end = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the time since the last step as waiting."""
        self._start = time.perf_counter()
        if self._end is not None:
            self._interval_wait += self._start - self._end

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step; log at the logging interval."""
        self._end = time.perf_counter()
        self._interval_busy += self._end - self._start
        stepped = trainer.global_step - self._global_step
        self._global_step = trainer.global_step
        self._steps += stepped
        self._samples += samples_in(batch) * trainer.world_size
        every = trainer.log_every_n_steps
        if not stepped or not every or trainer.global_step % every:
            return
        seconds = self._interval_busy + self._interval_wait
        self.step_seconds += self._interval_busy
        self.wait_seconds += self._interval_wait
        values = {
            "speed/steps_per_second": self._steps / seconds,
            "speed/samples_per_second": self._samples / seconds,
            "speed/data_wait": self._interval_wait / seconds,
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self._print(trainer, values)
        self._reset()
        self._end = time.perf_counter()

    def _print(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Print the progress occasionally if there is no progress bar, such as in the log of a job."""
        now = time.monotonic()
        if sys.stdout.isatty() or not trainer.is_global_zero or now - self._printed < SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        loss = trainer.callback_metrics.get("train/loss")
        shown = "" if loss is None else f", loss {float(loss):.4g}"
        limit = f" of {trainer.max_steps}" if trainer.max_steps > 0 else ""
        print(
            f"step {trainer.global_step}{limit}, {values['speed/steps_per_second']:.2f} steps/s{shown}",
            flush=True,
        )


def samples_in(batch: Any) -> int:
    """Return the length of the first tensor in a batch of any structure; 0 if there is none."""
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.ndim), 0)
