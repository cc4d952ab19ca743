"""Memory that loader workers share with the training process, filled again once its batch is gone."""

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
SLOTS = 4  # per worker: two batches prefetched, the one in use, and the one before it
START_METHOD = "fork" if sys.platform == "linux" else None
"""How loader workers start: only forked ones inherit a pool. None is Python's default for the platform."""

_pools: weakref.WeakValueDictionary[int, "BatchPool"] = weakref.WeakValueDictionary()
_numbers = count()


class BatchPool:
    """Slots of shared memory for the batches of a loader's workers.

    A batch in fresh shared memory costs a page fault per 4 KiB in the worker and again in the training process, which
    for uint8 pictures takes almost half as long as decoding them. A slot faults once. It is anonymous memory: neither
    files in ``/dev/shm``, whose size containers limit, nor sockets in ``$TMPDIR`` are needed to pass it on.

    Each worker fills slots of its own; a slot is free again when the last tensor of its batch is gone.

    Args:
        shapes: Shape and type of each tensor of a sample.
        batch_size: Samples in the largest batch.
        workers: Loader processes, forked from this one later.
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
        """A free slot of a worker, which is its own from now on; None where all hold batches that are still in use."""
        for slot in range(worker * SLOTS, (worker + 1) * SLOTS):
            if not self._taken[slot]:
                self._taken[slot] = 1
                return slot
        return None

    def give_back(self, slot: int) -> None:
        """Make a slot free again; in forks of the training process it does nothing, the batch is still in use here."""
        if os.getpid() == self._owner:
            self._taken[slot] = 0

    def tensors(self, slot: int, samples: int, in_use: bool = False) -> dict[str, Tensor]:
        """The tensors of a batch in a slot, [samples, ...].

        Args:
            slot: Its number.
            samples: Up to the pool's batch size.
            in_use: Give the slot back when the last of the tensors is gone.
        """
        memory = (ctypes.c_char * self._bytes).from_buffer(self._memory, slot * self._bytes)
        if in_use:
            weakref.finalize(memory, self.give_back, slot)
        return {
            name: torch.from_numpy(np.ndarray((samples, *shape), dtype, memoryview(memory), offset))
            for name, (offset, shape, dtype) in self._places.items()
        }


class SentBatch:
    """A batch on its way from a worker, which arrives as the dictionary of its tensors.

    One in a pool travels as its number. Any other travels with its contents, and not in the shared memory that torch
    makes for tensors: that needs room in ``/dev/shm`` and a short path of a socket in ``$TMPDIR``, and a worker that
    has neither dies or waits without a word.

    Args:
        windows: The numbers of its windows.
        contents: Its tensors.
        pool: The pool that holds them, in ``slot``; None where none had room.
        slot: Their place there.
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
