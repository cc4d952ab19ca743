"""The usual learning-rate schedule, whose end may be moved while training runs."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Progress:
    """How much of a decay is done after each step: straight lines between the steps at which its end was moved.

    Args:
        start: The step at which the decay begins.
        end: The step at which it is complete; None while that is unknown, and nothing is done.
    """

    def __init__(self, start: int, end: int | None) -> None:
        self.start, self.end = start, end
        self._since, self._done = start, 0.0

    def __call__(self, step: int) -> float:
        """The share that is done after a step, in [0, 1]."""
        if self.end is None or step <= self._since:
            return self._done
        return min(1.0, self._done + (1 - self._done) * ((step - self._since) / max(1, self.end - self._since)))

    def move_end(self, step: int, end: int) -> None:
        """Go on from what is done after ``step`` to be complete at ``end``; what is done never becomes less.

        A decay that has not begun keeps its start, unless less than half of all steps would be left for it.
        """
        done = self(step)
        self._since = step if step >= self._since else max(step, min(self.start, end // 2))
        self._done, self.end = done, end


class WarmupCosine(LambdaLR):
    """Linear warm-up to each group's own learning rate, then half a cosine down to ``final`` times it.

    Args:
        optimizer: Any; call ``step()`` of the schedule once per optimiser step.
        warmup_steps: The first step has 1/warmup_steps of the full rate; 0 starts at the full rate.
        total_steps: Where the cosine ends; afterwards the rate stays. None where that is not known yet: the rate
            stays full until `move_end` says.
        final: The rate at the end, relative to the full rate.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, total_steps: int | None, final: float = 0.0) -> None:
        self.warmup_steps, self.total_steps, self.final = warmup_steps, total_steps, final
        self.progress = Progress(warmup_steps, total_steps)
        self._settings = tuple(self.__dict__)
        super().__init__(optimizer, lambda step: self.factor(step))

    def factor(self, step: int) -> float:
        """The rate after a number of steps, relative to the full rate."""
        progress = self.progress(step)
        decayed = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
        if step >= self.warmup_steps:
            return decayed
        warm = (step + 1) / self.warmup_steps
        return min(warm, decayed) if progress else warm  # an end that has come near cuts the warm-up short

    def move_end(self, step: int, end: int) -> None:
        """After ``step``, aim for another last step: the rate goes on from where it is and, once warm, never rises.

        Args:
            step: The steps that were taken so far; 0 makes it the schedule that it would be with ``end`` from the
                beginning, as long as the end was not moved before.
            end: The new last step.
        """
        self.progress.move_end(step, end)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands. Where it ends is not part of that: a run may be continued under other limits."""
        hidden = (*self._settings, "_settings")
        return {key: value for key, value in super().state_dict().items() if key not in hidden}
