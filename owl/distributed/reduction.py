"""What the processes of a training must know of each other, so that dividing a batch does not change what is learnt."""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes, which must all call this; itself where there is one."""
    if not distributed.is_initialized():
        return x
    total = x.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def average_gradients(weights: Iterable[Tensor]) -> None:
    """Give every process the mean of all processes' gradients, in place, where nothing else has done so.

    Args:
        weights: The same in every process, which must all call this; one without a gradient counts as one of zero, so
            that processes whose losses reach different weights do not wait for each other for ever.
    """
    pending = []
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad /= distributed.get_world_size()
        pending.append(distributed.all_reduce(weight.grad, async_op=True))
    for work in pending:
        work.wait()
