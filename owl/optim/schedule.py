"""Warm-up and cosine learning rate schedule whose end can be moved during training."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Progress:
    """Completed fraction of a decay after each step: piecewise linear between the steps at which its end was moved.

    Args:
        start: The step at which the decay starts.
        end: The step at which it is complete; None if unknown, then the fraction is 0.
    """

    def __init__(self, start: int, end: int | None) -> None:
        self.start, self.end = start, end
        self._since, self._done = start, 0.0

    def __call__(self, step: int) -> float:
        """Return the completed fraction after a step, in [0, 1]."""
        if self.end is None or step <= self._since:
            return self._done
        return min(1.0, self._done + (1 - self._done) * ((step - self._since) / max(1, self.end - self._since)))

    def move_end(self, step: int, end: int) -> None:
        """Continue from the fraction completed after ``step`` such that the decay is complete at ``end``.

        The fraction never decreases. A decay that has not started keeps its start, unless fewer than half of all steps
        would remain for it.
        """
        done = self(step)
        self._since = step if step >= self._since else max(step, min(self.start, end // 2))
        self._done, self.end = done, end


class WarmupCosine(LambdaLR):
    """Linear warm-up to each group's learning rate, then half a cosine down to ``final`` times it.

    Args:
        optimizer: Any optimiser; call ``step()`` of the schedule once per optimiser step.
        warmup_steps: The first step has 1/warmup_steps of the full rate; 0 starts at the full rate.
        total_steps: Last step of the cosine; the rate is constant afterwards. None if not yet known: the full rate is
            used until `move_end` is called.
        final: The rate at the end, relative to the full rate.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, total_steps: int | None, final: float = 0.0) -> None:
        self.warmup_steps, self.total_steps, self.final = warmup_steps, total_steps, final
        self.progress = Progress(warmup_steps, total_steps)
        self._settings = tuple(self.__dict__)
        super().__init__(optimizer, lambda step: self.factor(step))

    def factor(self, step: int) -> float:
        """Return the rate after a number of steps, relative to the full rate."""
        progress = self.progress(step)
        decayed = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
        if step >= self.warmup_steps:
            return decayed
        warm = (step + 1) / self.warmup_steps
        return min(warm, decayed) if progress else warm  # an end during the warm-up shortens it

    def move_end(self, step: int, end: int) -> None:
        """Move the last step after ``step``: the rate continues from its current value and never rises after warm-up.

        Args:
            step: Number of completed steps; 0 gives the same schedule as ``total_steps=end``, if the end was not moved
                before.
            end: The new last step.
        """
        self.progress.move_end(step, end)

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the last step, since a run can be resumed with other limits."""
        hidden = (*self._settings, "_settings")
        return {key: value for key, value in super().state_dict().items() if key not in hidden}
