"""Training with several optimisers at their own cadence: what Lightning's trainer does by itself where there is one.

A recipe sets ``automatic_optimization = False`` and steps its optimisers in ``training_step``:

    with manual_step(self) as step:
        student, critic = self.optimizers()
        if step.due(5):
            step(student, self.student_loss(batch), clip=10.0)
        step(critic, self.critic_loss(batch), clip=10.0)
"""

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
    """One step of a training with several optimisers, as `manual_step` yields it.

    Attributes:
        number: The steps before this one, as the trainer's ``global_step`` counts them.
        complete: Whether this batch is the last one of its step; always, unless batches are accumulated.
    """

    def __init__(self, recipe: LightningModule, accumulate: int) -> None:
        trainer = recipe.trainer
        self._recipe, self._accumulate = recipe, accumulate
        self._clips: dict[Optimizer, float | None] = {}
        self.number = trainer.global_step
        self.complete = (trainer.fit_loop.batch_idx + 1) % accumulate == 0 or trainer.is_last_batch

    def due(self, every: int) -> bool:
        """Whether this is a step of what happens in every n-th one: the n-th, the 2 n-th, and so on.

        A function of the step's number alone, so a run that is interrupted amid a cycle continues there, and all
        processes and all batches of an accumulation agree.
        """
        return (self.number + 1) % every == 0

    def __call__(self, optimizer: Optimizer | LightningOptimizer, loss: Tensor, clip: float | None = None) -> None:
        """Run a loss backward, which frees its graph, and step an optimiser when the block is left.

        The loss teaches the weights of this optimiser and no others. Several losses of one optimiser add up.

        Args:
            optimizer: One of ``configure_optimizers``.
            loss: A scalar.
            clip: Largest norm of the gradients, in the place of ``trainer.gradient_clip_val``.
        """
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        trainer, strategy = self._recipe.trainer, self._recipe.trainer.strategy
        others = [p for other in trainer.optimizers if other is not optimizer for p in weights(other)]
        gradients = [p.grad for p in others]
        for parameter in others:
            parameter.grad = None
        # DDP itself would wait, at every backward, for the gradients of all networks
        silent = strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()
        with silent:
            self._recipe.manual_backward(loss / self._accumulate)
        for parameter, gradient in zip(others, gradients, strict=True):
            parameter.grad = gradient
        self._clips[optimizer] = clip

    def _finish(self) -> None:
        """Step every optimiser that was called for, all schedules, and the trainer's count."""
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
        # torch warns of a schedule that begins before its optimiser does
        with nullcontext() if self.number else catch_warnings(action="ignore", category=UserWarning):
            for schedule in trainer.lr_scheduler_configs:
                schedule.scheduler.step()  # type: ignore[call-arg]  # one that waits for a metric has no place here
        # what Lightning takes for the global step; its own wrappers would count every optimiser
        progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()


@contextmanager
def manual_step(recipe: LightningModule, accumulate: int = 1) -> Iterator[ManualStep]:
    """Take one step of training, in which those optimisers are stepped that the block calls for.

    They are stepped together when the block is left: every loss is one of the same weights, in whatever order, and
    accumulated batches teach what one large batch would. However many they are, the trainer's ``global_step`` grows by
    one, so that its limits, checkpoints, averages and `ManualStep.due` count the same steps. All schedules count them
    too, whichever optimiser was stepped: the learning rate of one that is stepped in every fifth step is that of the
    fifth step.

    Args:
        recipe: With ``automatic_optimization = False``, in its ``training_step``.
        accumulate: Batches that make one step, as the last ones of an epoch do however many they are; in the place of
            ``trainer.accumulate_grad_batches``. Give `owl.optim.configuration.with_schedule` the same number.

    Yields:
        What teaches one optimiser's weights: ``step(optimizer, loss, clip)``.
    """
    step = ManualStep(recipe, accumulate)
    yield step
    if step.complete:
        step._finish()


def weights(optimizer: Optimizer) -> list[Tensor]:
    """What an optimiser trains."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


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
