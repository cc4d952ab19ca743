"""Communication between ranks over the CPU, without device synchronisation and without timeouts."""

from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")

PATIENCE = timedelta(days=365)  # when a process ends, its connections break, which ends the waiting of the others


def host_group() -> distributed.ProcessGroup | None:
    """Create a gloo process group of all ranks; None for a single process. All ranks must call this."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return None
    return distributed.new_group(backend="gloo", timeout=PATIENCE)  # type: ignore[return-value]  # all ranks are members


def from_first(value: T, group: distributed.ProcessGroup | None) -> T:
    """Broadcast a value from rank 0; the other ranks wait without a timeout.

    Args:
        value: Picklable value; ignored on other ranks.
        group: See `host_group`.
    """
    if group is None:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0, group=group, device=torch.device("cpu"))
    return values[0]


class Agreement:
    """Asynchronous maximum over all ranks, available at the next call.

    A call starts to gather the numbers in the background and returns the result of the previous call, which is the same
    on every rank. A single process gets its number immediately.
    """

    def __init__(self) -> None:
        self._group = host_group()
        self._gathering: tuple[distributed.Work, torch.Tensor] | None = None

    def __call__(self, number: int) -> int:
        """Contribute a number, 0 or above; all ranks must call this the same number of times."""
        if self._group is None:
            return number
        if agreed := self.finish():
            return agreed
        largest = torch.tensor(number)
        work = distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._gathering = work, largest
        return 0

    def finish(self) -> int:
        """Return the result of the last call; every rank must call this before it exits."""
        if self._gathering is None:
            return 0
        (work, largest), self._gathering = self._gathering, None
        work.wait()
        return int(largest)
