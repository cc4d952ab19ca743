"""What the processes of a run tell each other over the CPU, so that no device is waited for and no wait times out."""

from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")

PATIENCE = timedelta(days=365)  # a process that ends breaks its connections, which ends the waiting of the others


def host_group() -> distributed.ProcessGroup | None:
    """A group of all processes over gloo; None for a single process. All processes must call this."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return None
    return distributed.new_group(backend="gloo", timeout=PATIENCE)  # type: ignore[return-value]  # all are members


def from_first(value: T, group: distributed.ProcessGroup | None) -> T:
    """What the first process has, in all of them, which wait for it however long it takes.

    Args:
        value: What can be pickled; that of the other processes is not looked at.
        group: See `host_group`.
    """
    if group is None:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0, group=group, device=torch.device("cpu"))
    return values[0]


class Agreement:
    """The largest of the numbers that all processes bring, told at the next call, so that nobody waits.

    A call begins to gather the numbers, in the background, and returns what the call before it has gathered: the same
    in every process. Of a single process it returns the number at once.
    """

    def __init__(self) -> None:
        self._group = host_group()
        self._gathering: tuple[distributed.Work, torch.Tensor] | None = None

    def __call__(self, number: int) -> int:
        """Bring a number, 0 or above; all processes must call this equally often."""
        if self._group is None:
            return number
        if agreed := self.finish():
            return agreed
        largest = torch.tensor(number)
        work = distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._gathering = work, largest
        return 0

    def finish(self) -> int:
        """What the last call has gathered; no process may leave before."""
        if self._gathering is None:
            return 0
        (work, largest), self._gathering = self._gathering, None
        work.wait()
        return int(largest)
