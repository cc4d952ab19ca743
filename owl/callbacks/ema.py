"""Exponential moving average of the trained weights."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from owl.distributed.sharding import shard_like, to_first, trainable
from owl.errors import OwlError
from owl.models import exported


class EMA(Callback):
    """Keep a moving average of the trained weights; validate with it and save it as the checkpoint's weights.

    Averages the networks that the recipe exports (`owl.models.exported`), otherwise all trained weights.

    After optimiser step n (from 1), ``average = d * average + (1 - d) * weight`` with
    ``d = min(decay, n / (n + 9))``: the warm-up removes the initialisation from the average of a short run.

    A checkpoint's ``state_dict`` contains the averaged weights, so that everything that reads it (export, the frozen
    part of a later recipe, ``validate``) uses them. The raw weights are stored under ``ema`` and restored when training
    resumes.

    Args:
        decay: Upper limit of the averaging factor, in [0, 1); 0 disables the average.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise OwlError("ema.decay", f"ema.decay is {decay}, expected a number in [0, 1); 0 turns the average off")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.updates = 0
        self._step = 0
        self._swapped = False
        self._raw: list[Tensor] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Initialise the average with the current weights, unless it was restored from a checkpoint."""
        weights = trainable(pl_module)
        if self.decay and not self.average:
            inside = tuple(f"{name}." for name in exported(pl_module)) if hasattr(pl_module, "exports") else ("",)
            self.average = {name: weight.clone() for name, weight in weights.items() if name.startswith(inside)}
        self.average = {name: average.to(weights[name].device) for name, average in self.average.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the step count of a resumed run (not known to the trainer in ``on_fit_start``)."""
        self._step = trainer.global_step
        weights = trainable(pl_module)
        self._raw = [weights[name] for name in self.average]  # looking them up takes milliseconds per step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after an optimiser step, not after every accumulated batch."""
        if not self.average or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9))
        torch._foreach_lerp_(list(self.average.values()), self._raw, 1 - decay)

    def _exchange(self, pl_module: LightningModule) -> None:
        """Swap the averaged and the raw weights in place."""
        weights = trainable(pl_module)
        for name, average in self.average.items():
            raw = weights[name].clone()
            weights[name].copy_(average)
            average.copy_(raw)
        self._swapped = not self._swapped

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the averaged weights."""
        if self.average and not self._swapped:
            self._exchange(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue training the raw weights."""
        if self._swapped:
            self._exchange(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the raw weights when validation was interrupted."""
        self.on_validation_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the average as the checkpoint's weights, and the raw weights separately."""
        if not self.average:
            return
        stored = checkpoint["state_dict"]  # the module's current weights; of a sharded network on rank 0 only
        in_module = {name: stored[name] for name in self.average if name in stored}
        beside = {name: to_first(average) for name, average in self.average.items()}
        beside = {name: average for name, average in beside.items() if average is not None}
        averaged, raw = (in_module, beside) if self._swapped else (beside, in_module)
        stored.update(averaged)
        checkpoint["ema"] = {"raw": raw, "updates": self.updates}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the average from the loaded weights, and the raw weights in the module.

        Other commands keep the average in the module.
        """
        stored = checkpoint.get("ema")
        if stored is None or trainer.state.fn != "fit":
            return
        weights = trainable(pl_module)
        if self.decay:
            self.updates = stored["updates"]
            self.average = {name: weights[name].clone() for name in stored["raw"]}
        for name, raw in stored["raw"].items():
            weights[name].copy_(shard_like(raw, weights[name]))
