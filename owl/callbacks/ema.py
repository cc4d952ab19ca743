"""Exponential moving average of the trained weights."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from owl.distributed.sharding import shard_like, to_first, trainable
from owl.errors import OwlError
from owl.models import exported


class EMA(Callback):
    """Keeps a moving average of the trained weights; validates with it and saves it as the checkpoint's weights.

    Of a recipe that names what it exports (`owl.models.exported`) those networks are averaged, else all it trains.

    After optimiser step n (from 1), ``average = d * average + (1 - d) * weight`` with
    ``d = min(decay, n / (n + 9))``: the warm-up lets a short run forget its initialisation.

    A checkpoint's ``state_dict`` holds the averaged weights, so that whatever reads it (export, a later recipe's
    frozen part, ``validate``) gets the weights one wants; the raw ones stand beside it under ``ema`` and are
    put back when training resumes.

    Args:
        decay: Limit of the averaging factor, in [0, 1); 0 turns the average off.
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
        """Start the average from the current weights, or keep the one that the checkpoint brought."""
        weights = trainable(pl_module)
        if self.decay and not self.average:
            inside = tuple(f"{name}." for name in exported(pl_module)) if hasattr(pl_module, "exports") else ("",)
            self.average = {name: weight.clone() for name, weight in weights.items() if name.startswith(inside)}
        self.average = {name: average.to(weights[name].device) for name, average in self.average.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where a resumed run stands (in ``on_fit_start`` the trainer does not know yet)."""
        self._step = trainer.global_step
        weights = trainable(pl_module)
        self._raw = [weights[name] for name in self.average]  # to look for them takes milliseconds, at every step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average after an optimiser step, not after every accumulated batch."""
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
        """Go on training the raw weights."""
        if self._swapped:
            self._exchange(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the raw weights in place when validation was interrupted."""
        self.on_validation_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the average as the checkpoint's weights and the raw weights beside it."""
        if not self.average:
            return
        stored = checkpoint["state_dict"]  # what the module holds now; of a network that is spread on rank 0 alone
        in_module = {name: stored[name] for name in self.average if name in stored}
        beside = {name: to_first(average) for name, average in self.average.items()}
        beside = {name: average for name, average in beside.items() if average is not None}
        averaged, raw = (in_module, beside) if self._swapped else (beside, in_module)
        stored.update(averaged)
        checkpoint["ema"] = {"raw": raw, "updates": self.updates}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resume: the loaded weights are the average, the raw ones go back into the module.

        Every other command keeps the average in the module, and needs nothing else.
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
