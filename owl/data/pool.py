"""Shared memory for batches of worker processes, reused once a batch is freed."""

import ctypes
import mmap
import os
import sys
import weakref
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, a cache line
SLOTS = 4  # per worker: two prefetched batches, the current one, and the previous one
START_METHOD = "fork" if sys.platform == "linux" else None
"""Start method of worker processes: only forked processes inherit a pool. None is the platform's default."""

_pools: weakref.WeakValueDictionary[int, "BatchPool"] = weakref.WeakValueDictionary()
_numbers = count()


class BatchPool:
    """Slots of shared memory for the batches of a loader's worker processes.

    A batch in fresh shared memory costs a page fault per 4 KiB in the worker and again in the training process, which
    for uint8 pictures takes almost half as long as decoding them. A slot faults once. It is anonymous memory: sharing
    it needs neither files in ``/dev/shm``, whose size containers limit, nor sockets in ``$TMPDIR``.

    Each worker has its own slots; a slot is free again when the last tensor of its batch is freed.

    Args:
        shapes: Shape and dtype of each tensor of a sample.
        batch_size: Samples in the largest batch.
        workers: Number of worker processes, which are forked from this process later.
    """

    def __init__(self, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], batch_size: int, workers: int) -> None:
        self._places: dict[str, tuple[int, tuple[int, ...], np.dtype]] = {}
        self._bytes = 0  # of a slot
        for name, (shape, dtype) in shapes.items():
            self._places[name] = (self._bytes, shape, torch.empty(0, dtype=dtype).numpy().dtype)
            size = batch_size * int(np.prod(shape)) * dtype.itemsize
            self._bytes += -(-size // ALIGNMENT) * ALIGNMENT
        self._memory = mmap.mmap(-1, max(1, workers * SLOTS * self._bytes))
        # one writer at a time: the worker sets a flag that is 0, this process clears one that is 1
        self._taken = np.frombuffer(mmap.mmap(-1, workers * SLOTS), np.uint8)
        self._owner = os.getpid()
        self.number = next(_numbers)
        _pools[self.number] = self

    def take(self, worker: int) -> int | None:
        """Reserve and return a free slot of a worker; None if all slots hold batches in use."""
        for slot in range(worker * SLOTS, (worker + 1) * SLOTS):
            if not self._taken[slot]:
                self._taken[slot] = 1
                return slot
        return None

    def release(self, slot: int) -> None:
        """Free a slot; no effect in forks of the training process, where the batch is still in use."""
        if os.getpid() == self._owner:
            self._taken[slot] = 0

    def tensors(self, slot: int, samples: int, in_use: bool = False) -> dict[str, Tensor]:
        """Return the tensors of a batch in a slot, [samples, ...].

        Args:
            slot: Number of the slot.
            samples: Number of samples, at most the pool's batch size.
            in_use: Whether to free the slot when the last of the tensors is freed.
        """
        memory = (ctypes.c_char * self._bytes).from_buffer(self._memory, slot * self._bytes)
        if in_use:
            weakref.finalize(memory, self.release, slot)
        return {
            name: torch.from_numpy(np.ndarray((samples, *shape), dtype, memoryview(memory), offset))
            for name, (offset, shape, dtype) in self._places.items()
        }


class SentBatch:
    """A batch sent by a worker, which is unpickled as the dictionary of its tensors.

    A batch in a pool is sent as its slot. Other batches are sent as bytes, without torch's shared memory for tensors:
    that needs space in ``/dev/shm`` and a short socket path in ``$TMPDIR``; otherwise a worker dies or blocks silently.

    Args:
        windows: The indices of its windows.
        contents: Its tensors.
        pool: The pool that holds them, in ``slot``; None if it had no free slot.
        slot: Slot of the tensors in the pool.
    """

    def __init__(
        self, windows: list[int], contents: dict[str, Tensor], pool: BatchPool | None = None, slot: int = 0
    ) -> None:
        self._windows, self._contents, self._pool, self._slot = windows, contents, pool, slot

    def __reduce__(self) -> tuple[Any, ...]:
        if self._pool is not None:
            return _from_pool, (self._windows, self._pool.number, self._slot)
        return _from_arrays, (self._windows, {name: tensor.numpy() for name, tensor in self._contents.items()})


def _from_pool(windows: list[int], pool: int, slot: int) -> dict[str, Tensor]:
    return {"window": torch.tensor(windows), **_pools[pool].tensors(slot, len(windows), in_use=True)}


def _from_arrays(windows: list[int], arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {"window": torch.tensor(windows), **{name: torch.from_numpy(array) for name, array in arrays.items()}}
