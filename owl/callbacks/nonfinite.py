"""Stop at the first loss that is not finite, and record the samples of its batch."""

import json
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from owl.atomic import atomic_write
from owl.errors import OwlError
from owl.nn.frozen import trained


class NonFiniteGuard(Callback):
    """Stop training when the loss becomes NaN or infinite and record the samples of the batch.

    The losses are checked at the logging interval and before every checkpoint, so that steps do not wait for a GPU or
    for other ranks, and no checkpoint is written after a bad step. A single process on the CPU checks every step.
    Before a checkpoint the weights are checked as well: a gradient can be NaN although the loss is finite. Steps
    without a loss (``training_step`` returned None, or a dict without one) are ignored.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[int, Tensor, Tensor | None]] = []
        self._last: tuple[int, Tensor | None] = (0, None)
        self._batches = 0  # since the last check; counted separately, since ranks can skip different batches

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Store the loss and the windows of this step."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        windows = batch.get("window") if isinstance(batch, dict) else None
        self._last = (trainer.global_step, windows)
        self._batches += 1
        if isinstance(loss, Tensor):
            self._pending.append((trainer.global_step, loss.detach(), windows))
        at_once = trainer.world_size == 1 and pl_module.device.type == "cpu"
        if at_once or self._batches >= trainer.log_every_n_steps:
            self.check_losses(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check before a checkpoint is written."""
        self.check_losses(trainer)
        norms = torch._foreach_norm([p.detach() for p in trained(pl_module).values()])
        if norms and not torch.stack(norms).isfinite().all():
            self.stop(trainer, "a weight", float("nan"), *self._last)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the remaining losses."""
        self.check_losses(trainer)

    def check_losses(self, trainer: Trainer) -> None:
        """Check the stored losses; all ranks stop if one of them has a bad loss.

        Raises:
            OwlError: A loss is not finite.
        """
        pending, self._pending, self._batches = self._pending, [], 0
        finite = torch.stack([loss.isfinite().all() for _, loss, _ in pending]).tolist() if pending else []
        if not trainer.strategy.reduce_boolean_decision(not all(finite), all=False):
            return
        if all(finite):
            raise OwlError(
                "loss.non-finite", "the loss became NaN or infinite in another process; see its error for the samples"
            )
        step, loss, windows = pending[finite.index(False)]
        self.stop(trainer, "the loss", float(loss), step, windows)

    @staticmethod
    def stop(trainer: Trainer, what: str, value: float, step: int, windows: Tensor | None) -> NoReturn:
        """Write the samples of a step and raise.

        Raises:
            OwlError: Always; ``<run folder>/nonfinite-rank<rank>.json`` names the step and its samples.
        """
        indices = windows.tolist() if windows is not None else []
        dataset = getattr(trainer.datamodule, "train_dataset", None)
        describe = getattr(dataset, "describe", None)  # other data modules may not implement it
        samples = [describe(index) for index in indices] if describe else []
        path = Path(trainer.default_root_dir) / f"nonfinite-rank{trainer.global_rank}.json"
        record = {"step": step, "found": f"{what} became {value}", "windows": indices, "samples": samples}
        atomic_write(path, json.dumps(record, indent=2))
        raise OwlError(
            "loss.non-finite",
            f"{what} became {value} at step {step}; the samples of the batch are listed in {path}; "
            "lower the learning rate, set trainer.gradient_clip_val, or check those samples, "
            "then resume from the last checkpoint with --ckpt_path last",
        )
