"""Configuration of optimisers with a learning rate schedule, shared by recipes."""

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer

from owl.errors import OwlError
from owl.nn.frozen import trained
from owl.optim.schedule import WarmupCosine


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Return the trained parameters of a network, those of the layers in its attribute ``outer`` as their own group.

    `owl.optim.MuonAdamW` updates that group by AdamW; for other optimisers the groups are equal.
    """
    outer = {id(parameter) for layer in getattr(network, "outer", ()) for parameter in layer.parameters()}
    parameters = trained(network).values()
    groups = [
        {"params": [parameter for parameter in parameters if id(parameter) not in outer], "hidden": True},
        {"params": [parameter for parameter in parameters if id(parameter) in outer], "hidden": False},
    ]
    return [group for group in groups if group["params"]]


def with_schedule(
    recipe: LightningModule, optimizer: Optimizer, warmup_steps: int, final_lr: float, accumulate: int = 1
) -> OptimizerLRSchedulerConfig:
    """Return an optimiser with linear warm-up and a cosine until the last step, for ``configure_optimizers``.

    If a time limit ends training earlier, or there is no limit of steps, the callback `owl.callbacks.budget.Budget`
    moves the end of the cosine. A recipe with several optimisers returns a list with one result per optimiser; every
    schedule follows the trainer's ``global_step``, also for an optimiser that is stepped less often.

    Args:
        recipe: Recipe attached to a trainer.
        optimizer: Optimiser of its weights.
        warmup_steps: Steps until the peak.
        final_lr: Learning rate at the end, as a fraction of its peak.
        accumulate: Batches per step if the recipe itself accumulates, as in `owl.optim.stepping.manual_step`.

    Raises:
        OwlError: Training has neither a limit of steps nor a time limit.
    """
    total = last_step(recipe.trainer, accumulate)
    callbacks = recipe.trainer.callbacks  # type: ignore[attr-defined]
    timers = (callback for callback in callbacks if isinstance(callback, Timer))
    if total is None and all(timer.time_remaining() is None for timer in timers):
        raise OwlError(
            "schedule.no-end",
            "training has no limit at which the cosine of the learning rate can end; set trainer.max_steps, "
            "trainer.max_epochs or trainer.max_time",
        )
    schedule = WarmupCosine(optimizer, warmup_steps, total, final_lr)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def last_step(trainer: Trainer, accumulate: int = 1) -> int | None:
    """Return the optimiser step at which the trainer's limits on steps and epochs end training; None without a limit.

    Args:
        trainer: Trainer with its limits.
        accumulate: Batches per step if the recipe itself accumulates.
    """
    total = trainer.estimated_stepping_batches  # does not include the recipe's accumulation
    if accumulate > 1 and trainer.max_epochs != -1 and math.isfinite(trainer.num_training_batches):
        assert trainer.max_epochs is not None
        total = math.ceil(trainer.num_training_batches / accumulate) * max(trainer.max_epochs, 1)
        total = min(total, trainer.max_steps) if trainer.max_steps != -1 else total
    return int(total) if math.isfinite(total) and total >= 0 else None
