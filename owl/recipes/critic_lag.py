"""Watch whether the critic of distribution matching keeps up with its student."""

import math
import warnings

import torch
from torch import Tensor, nn

from owl.distributed.reduction import mean_over_processes
from owl.errors import OwlError

DECAY = 0.9
"""Of the running means, per student step."""
LAGGING, DIVERGED = 1.1, 4.0
"""Ratios at which a warning is given and training is stopped."""


class CriticLag(nn.Module):
    """Error of the critic on generated frames divided by that of the teacher on the same ones, as running means.

    Both predict the velocity of the same noisy frames. The critic is trained on generated frames and the teacher is
    not, so the ratio starts at 1, where they are equal, and then stays below. Above 1 the critic has not followed the
    student, and the gradient that it gives is wrong.
    """

    errors: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("errors", torch.zeros(2))  # stored, so that a resumed run warns at the same step
        self._warned = False

    @torch.no_grad()
    def update(self, critic: Tensor, teacher: Tensor) -> None:
        """Add the mean squared errors of a student step, float[]; all ranks must call this."""
        self.errors.lerp_(mean_over_processes(torch.stack([critic, teacher]).to(self.errors)), 1 - DECAY)

    @property
    def ratio(self) -> Tensor:
        """The ratio, float[]; NaN before the first student step."""
        return self.errors[0] / self.errors[1]

    def check(self) -> None:
        """Warn, once, if the critic lags.

        Raises:
            OwlError: It has diverged.
        """
        critic, teacher = self.errors.tolist()
        if not teacher and not critic:
            return
        ratio = critic / teacher if teacher else math.inf
        message = f"the critic's error on generated frames is {ratio:.2f} times the teacher's, expected at most 1"
        if not ratio < DIVERGED:
            raise OwlError(
                "critic.diverged",
                f"{message}: it has diverged; lower the learning rate of critic_optimizer, or raise critic_steps, and "
                "start again from an earlier checkpoint",
            )
        if ratio > LAGGING and not self._warned:
            warnings.warn(
                f"{message}: it does not keep up with the student, whose gradient becomes wrong; raise critic_steps, "
                "or lower the learning rate of the student's optimizer",
                stacklevel=2,
            )
        self._warned = ratio > LAGGING
