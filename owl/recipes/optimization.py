"""What recipes have in common around their optimiser."""

import math

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer

from owl.errors import OwlError
from owl.optim import warmup_cosine


def with_schedule(
    recipe: LightningModule, optimizer: Optimizer, warmup_steps: int, final_lr: float
) -> OptimizerLRScheduler:
    """What ``configure_optimizers`` returns: an optimiser with linear warm-up and a cosine until the last step.

    Args:
        recipe: Attached to its trainer.
        optimizer: Of all its weights.
        warmup_steps: Steps until the peak.
        final_lr: Learning rate at the end, as a fraction of its peak.

    Raises:
        OwlError: Training has no last step.
    """
    total = recipe.trainer.estimated_stepping_batches
    if math.isinf(total):
        raise OwlError(
            "schedule.no-end",
            "training has no last step, at which the cosine of the learning rate ends; set trainer.max_steps, which "
            "trainer.max_time may cut short",
        )
    schedule = warmup_cosine(optimizer, warmup_steps, int(total), final_lr)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
