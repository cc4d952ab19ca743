"""Stop at the first loss that is not finite, and say which samples made it."""

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
    """Stops training when the loss becomes NaN or infinite and saves the identity of the batch.

    The losses are checked together in the logging interval and before every checkpoint, so that neither a GPU nor
    another process is waited for at every step, and no checkpoint is ever written after a bad step. A single process on
    the CPU checks every step. Before a checkpoint the weights are checked as well: a gradient may be NaN although the
    loss was not. Steps without a loss (``training_step`` returned None, or a dict without one) are left out.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[int, Tensor, Tensor | None]] = []
        self._last: tuple[int, Tensor | None] = (0, None)
        self._batches = 0  # since the last check; counted apart, as a process may skip a batch that others do not

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the loss and the windows of this step."""
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
        """Never let a checkpoint follow a bad step unnoticed."""
        self.check_losses(trainer)
        norms = torch._foreach_norm([p.detach() for p in trained(pl_module).values()])
        if norms and not torch.stack(norms).isfinite().all():
            self.stop(trainer, "a weight", float("nan"), *self._last)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what is left."""
        self.check_losses(trainer)

    def check_losses(self, trainer: Trainer) -> None:
        """Look at the remembered losses; all processes stop when those of one are bad.

        Raises:
            OwlError: One is not finite.
        """
        pending, self._pending, self._batches = self._pending, [], 0
        finite = torch.stack([loss.isfinite().all() for _, loss, _ in pending]).tolist() if pending else []
        if not trainer.strategy.reduce_boolean_decision(not all(finite), all=False):
            return
        if all(finite):
            raise OwlError(
                "loss.non-finite", "the loss became NaN or infinite in another process, which names its batch's samples"
            )
        step, loss, windows = pending[finite.index(False)]
        self.stop(trainer, "the loss", float(loss), step, windows)

    @staticmethod
    def stop(trainer: Trainer, what: str, value: float, step: int, windows: Tensor | None) -> NoReturn:
        """Write which samples a step saw.

        Raises:
            OwlError: Always; ``<run folder>/nonfinite-rank<rank>.json`` names the step and its samples.
        """
        indices = windows.tolist() if windows is not None else []
        dataset = getattr(trainer.datamodule, "train_dataset", None)
        describe = getattr(dataset, "describe", None)  # another data module than ours need not have one
        samples = [describe(index) for index in indices] if describe else []
        path = Path(trainer.default_root_dir) / f"nonfinite-rank{trainer.global_rank}.json"
        record = {"step": step, "found": f"{what} became {value}", "windows": indices, "samples": samples}
        atomic_write(path, json.dumps(record, indent=2))
        raise OwlError(
            "loss.non-finite",
            f"{what} became {value} at step {step}; the batch's samples are named in {path}; "
            "lower the learning rate, set trainer.gradient_clip_val, or look at those samples, "
            "then continue from the last checkpoint with --ckpt_path last",
        )
