"""Training with several optimisers: what Lightning's trainer does by itself where there is one."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor


def manual_step(
    recipe: LightningModule, loss: Tensor, batch_idx: int, accumulate: int = 1, clip: float | None = None
) -> None:
    """One backward for all of a recipe's networks and, where the accumulation is complete, a step of every optimiser.

    The steps of all optimisers count as one of the trainer, so that its limits, checkpoints and averages see the same
    number as with one optimiser. Two backwards would make DDP wait for gradients that only the other one brings: what
    one network's loss must not teach another is kept from it by `only_towards` and ``detach``.

    Args:
        recipe: With ``automatic_optimization = False``, in its ``training_step``.
        loss: A scalar, the sum of the losses of all networks.
        batch_idx: As ``training_step`` got it.
        accumulate: Batches that make one step, as the last ones of an epoch do however many they are; in the place of
            ``trainer.accumulate_grad_batches``. `owl.optim.configuration.with_schedule` is to be told as well.
        clip: Largest norm of the gradients of each optimiser, in the place of ``trainer.gradient_clip_val``.
    """
    complete = (batch_idx + 1) % accumulate == 0 or recipe.trainer.is_last_batch
    strategy = recipe.trainer.strategy
    silent = not complete and isinstance(strategy, ParallelStrategy)
    with strategy.block_backward_sync() if silent else nullcontext():  # type: ignore[attr-defined]
        recipe.manual_backward(loss / accumulate)
    if not complete:
        return
    wrapped = recipe.optimizers()
    for number, optimizer in enumerate(recipe.trainer.optimizers):
        if clip is not None:
            recipe.clip_gradients(optimizer, clip, "norm")
        # Lightning counts the steps of its own wrappers: that of the first one alone
        if number == 0:
            (wrapped[0] if isinstance(wrapped, list) else wrapped).step()
        else:
            strategy.optimizer_step(optimizer, lambda: None)
        optimizer.zero_grad()
    for schedule in recipe.trainer.lr_scheduler_configs:
        schedule.scheduler.step()  # type: ignore[call-arg]  # one that waits for a metric has no place here


def only_towards(x: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """A loss that teaches what made ``x``, and none of the networks that judge it.

    Unlike ``requires_grad_(False)`` around the judgement this also holds for weights that FSDP2 spreads, and their
    gradients are never computed.

    Args:
        x: Any shape; made by the network that is to learn.
        loss_of: Maps it to a scalar, through networks that are not to learn.

    Returns:
        A scalar of the same value and, towards ``x``, the same gradient.
    """
    leaf = x.detach().requires_grad_()
    loss = loss_of(
        leaf.view_as(leaf)
    )  # networks that are given a leaf cannot be watched by torch's counter of operators
    (gradient,) = torch.autograd.grad(loss, leaf)
    # the second term is zero and has the gradient
    return loss.detach() + ((x - x.detach()) * gradient).sum()
