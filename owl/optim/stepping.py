"""Training with several optimisers at different cadences.

A recipe sets ``automatic_optimization = False`` and steps its optimisers in ``training_step``:

    with manual_step(self) as step:
        student, critic = self.optimizers()
        if step.due(5):
            step(student, self.student_loss(batch), clip=10.0)
        step(critic, self.critic_loss(batch), clip=10.0)
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from warnings import catch_warnings

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from owl.distributed.reduction import average_gradients
from owl.distributed.sharding import reshard


class ManualStep:
    """One training step with several optimisers, yielded by `manual_step`.

    Attributes:
        number: Number of previous steps, the trainer's ``global_step``.
        complete: Whether this batch is the last one of its step; always true without accumulation.
    """

    def __init__(self, recipe: LightningModule, accumulate: int) -> None:
        trainer = recipe.trainer
        self._recipe, self._accumulate = recipe, accumulate
        self._clips: dict[Optimizer, float | None] = {}
        self.number = trainer.global_step
        self.complete = (trainer.fit_loop.batch_idx + 1) % accumulate == 0 or trainer.is_last_batch

    def due(self, every: int) -> bool:
        """Return whether this is every n-th step: the n-th, the 2 n-th, and so on.

        Depends only on the step's number, so a run that is interrupted within a cycle continues there, and all ranks
        and all batches of an accumulation agree.

        The recipe's attribute ``cycle`` is set to the number of steps after which its cadences repeat.
        """
        self._recipe.cycle = math.lcm(cycle_of(self._recipe), every)  # type: ignore[assignment]
        return (self.number + 1) % every == 0

    def __call__(self, optimizer: Optimizer | LightningOptimizer, loss: Tensor, clip: float | None = None) -> None:
        """Run the backward pass of a loss, which frees its graph, and step an optimiser at the end of the block.

        Gradients are computed only for the weights of this optimiser. Several losses of one optimiser are summed.

        Args:
            optimizer: One of ``configure_optimizers``.
            loss: A scalar.
            clip: Maximum norm of the gradients, instead of ``trainer.gradient_clip_val``.
        """
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        trainer, strategy = self._recipe.trainer, self._recipe.trainer.strategy
        others = [p for other in trainer.optimizers if other is not optimizer for p in weights(other)]
        gradients = [p.grad for p in others]
        for parameter in others:
            parameter.grad = None
        # DDP would wait, in every backward pass, for the gradients of all networks
        silent = strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()
        with silent:
            self._recipe.manual_backward(loss / self._accumulate)
        for parameter, gradient in zip(others, gradients, strict=True):
            parameter.grad = gradient
        self._clips[optimizer] = clip

    def _finish(self) -> None:
        """Step every requested optimiser and all schedules, and increment the trainer's global step."""
        recipe, trainer = self._recipe, self._recipe.trainer
        if recipe.device_mesh is not None:
            reshard(recipe)
        for optimizer, clip in self._clips.items():
            if isinstance(trainer.strategy, DDPStrategy):
                average_gradients(weights(optimizer))
            if clip is not None:
                recipe.clip_gradients(optimizer, clip, "norm")
            trainer.strategy.optimizer_step(optimizer, lambda: None)
            optimizer.zero_grad()
        # torch warns if a schedule is stepped before its optimiser
        with nullcontext() if self.number else catch_warnings(action="ignore", category=UserWarning):
            for schedule in trainer.lr_scheduler_configs:
                schedule.scheduler.step()  # type: ignore[call-arg]  # schedules that need a metric are not supported
        # Lightning's counter of the global step; its wrappers would count every optimiser
        progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()


@contextmanager
def manual_step(recipe: LightningModule, accumulate: int = 1) -> Iterator[ManualStep]:
    """Perform one training step, in which the optimisers requested in the block are stepped.

    They are stepped together at the end of the block: all losses are computed with the same weights, in any order, and
    accumulated batches equal one large batch. The trainer's ``global_step`` increases by one for any number of
    optimisers, so that its limits, checkpoints, EMA and `ManualStep.due` count the same steps. All schedules follow it,
    whichever optimiser was stepped: an optimiser that is stepped in every fifth step uses the learning rate of that
    step.

    Args:
        recipe: Recipe with ``automatic_optimization = False``, in its ``training_step``.
        accumulate: Batches per step, instead of ``trainer.accumulate_grad_batches``; the remaining batches at the end
            of an epoch form one step. Pass the same number to `owl.optim.configuration.with_schedule`.

    Yields:
        Function that steps one optimiser: ``step(optimizer, loss, clip)``.
    """
    step = ManualStep(recipe, accumulate)
    yield step
    if step.complete:
        step._finish()


def cycle_of(recipe: LightningModule) -> int:
    """Return the number of steps after which the cadences of a recipe repeat, known once it has taken a step."""
    return int(getattr(recipe, "cycle", 1))


def weights(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of an optimiser."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def only_towards(x: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a loss with a gradient towards ``x`` only, and not towards the networks in ``loss_of``.

    Unlike ``requires_grad_(False)`` around the call, this also works for weights sharded by FSDP2, and their gradients
    are never computed.

    Args:
        x: Any shape; output of the network to be trained.
        loss_of: Maps ``x`` to a scalar, through networks that are not to be trained.

    Returns:
        A scalar with the same value and the same gradient towards ``x``.
    """
    leaf = x.detach().requires_grad_()
    loss = loss_of(leaf.view_as(leaf))  # torch's operator counter does not support networks whose input is a leaf
    (gradient,) = torch.autograd.grad(loss, leaf)
    return with_gradient(loss, x, gradient)


def with_gradient(loss: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """Return a loss with a given gradient towards ``x``.

    Args:
        loss: A scalar, whose value is kept.
        x: Any shape; output of the network to be trained.
        gradient: The same shape.
    """
    # the second term is zero and carries the gradient
    return loss.detach() + ((x - x.detach()) * gradient).sum()
