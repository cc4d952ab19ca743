"""Reductions over ranks, so that dividing a batch among ranks does not change the result of training."""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed


def mean_over_processes(x: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks, which must all call this."""
    if not distributed.is_initialized():
        return x
    total = x.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def average_gradients(weights: Iterable[Tensor]) -> None:
    """Average gradients over all ranks in place, if no strategy has done so.

    Args:
        weights: The same on every rank, which must all call this. A missing gradient counts as zero, so that ranks
            whose losses reach different weights do not deadlock.
    """
    pending = []
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad /= distributed.get_world_size()
        pending.append(distributed.all_reduce(weight.grad, async_op=True))
    for work in pending:
        work.wait()
