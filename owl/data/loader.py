"""Data loader whose batches are a pure function of (seed, epoch, batch): a run resumes exactly where it stopped."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler, get_worker_info

from owl.data.failures import report_failures, worker_failure
from owl.data.pool import START_METHOD, BatchPool, SentBatch
from owl.data.windows import WindowDataset
from owl.errors import OwlError
from owl.spacing import evenly_spaced


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """Batch sampler of this rank for training, reshuffled each epoch.

    Global batch b of an epoch contains the positions [b * W * B, (b + 1) * W * B) of the epoch's order; rank r gets
    the r-th B of them, so W ranks with batch size B see the same data as one rank with W * B. The last, incomplete
    batch is dropped.

    Args:
        dataset: The windows.
        batch_size: B, samples per batch of this rank.
        seed: Seed of the order and of the augmentation; not negative.
        shuffle_block: Number of shards that are shuffled together, in blocks in random order, so that remote shards are
            read one after another; None shuffles all windows.
        rank: Rank of this process, below ``world_size``.
        world_size: Number of ranks, W.

    Raises:
        OwlError: There are fewer windows than one global batch.
    """

    def __init__(
        self,
        dataset: WindowDataset,
        batch_size: int,
        seed: int = 0,
        shuffle_block: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.global_batch = world_size * batch_size
        if len(dataset) < self.global_batch:
            raise OwlError(
                "loader.too-few-windows",
                f"split {dataset.split!r} of {dataset.path} has {len(dataset)} windows, expected at least one "
                f"batch of {self.global_batch} ({world_size} x {batch_size}); use a smaller batch_size or more data",
            )
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle_block = shuffle_block
        self.epoch = 0
        self.first = 0  # first batch of the next iteration
        self._windows = len(dataset)
        self._blocks = [range(len(dataset))] if shuffle_block is None else dataset.shard_windows()
        self._offset = rank * batch_size

    def identity(self) -> dict[str, Any]:
        """Values that determine the order and the batches of an epoch, except the windows, which may be added."""
        return {"global_batch": self.global_batch, "seed": self.seed, "shuffle_block": self.shuffle_block}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; called by Lightning before each. An epoch other than the loaded one starts at batch 0."""
        if epoch != self.epoch:
            self.epoch, self.first = epoch, 0

    def order(self, epoch: int) -> np.ndarray:
        """Return the window indices in the order of an epoch: uint32[N], or int64[N] for more than 4 billion."""
        generator = np.random.default_rng((self.seed, epoch))
        blocks = [self._blocks[i] for i in generator.permutation(len(self._blocks))]
        # filled and shuffled in place: 1,000 hours have 100 million windows
        order = np.empty(self._windows, np.uint32 if self._windows < 2**32 else np.int64)
        step, filled = self.shuffle_block or 1, 0
        for start in range(0, len(blocks), step):
            begin = filled
            for block in blocks[start : start + step]:
                order[filled : filled + len(block)] = np.arange(block.start, block.stop, dtype=order.dtype)
                filled += len(block)
            generator.shuffle(order[begin:filled])
        return order

    def __len__(self) -> int:
        return self._windows // self.global_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # values read here are fixed when the iterator is created; later calls do not change it
        return self._iterate(self.epoch, self.first)

    def _iterate(self, epoch: int, first: int) -> Iterator[list[tuple[int, int]]]:
        order = self.order(epoch)
        # numpy hashes seeds, so consecutive ones give independent draws; positions are the same for every world size
        augmentation = int(np.random.default_rng((self.seed, epoch, 1)).integers(2**62))
        for batch in range(first, len(self)):
            begin = batch * self.global_batch + self._offset
            positions = range(begin, begin + self.batch_size)
            yield [(int(order[position]), augmentation + position) for position in positions]


class RepeatedBatches(GlobalBatches, SequentialSampler):  # type: ignore[misc]
    """The batches of the first epoch in every epoch, with the same augmentation, for ``trainer.overfit_batches``.

    As a `SequentialSampler`, it counts as not shuffled and is not replaced by Lightning.
    """

    def _iterate(self, epoch: int, first: int) -> Iterator[list[tuple[int, int]]]:
        return super()._iterate(0, first)


class FixedBatches(SequentialSampler):
    """The same batches in every pass; as a `SequentialSampler`, it counts as not shuffled for Lightning.

    Args:
        batches: Window indices of each batch.
    """

    def __init__(self, batches: Sequence[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class WindowBatches(Dataset):
    """A dataset whose items are whole batches, for a loader without collation.

    An `OwlError` is returned as an item: if it were raised in a worker, PyTorch would change its type.

    Args:
        windows: The windows.
        batch_size: Samples in the largest batch.
        num_workers: Number of worker processes of the loader.
    """

    def __init__(self, windows: WindowDataset, batch_size: int, num_workers: int) -> None:
        self.windows = windows
        pooled = num_workers > 0 and START_METHOD == "fork"
        self._pool = BatchPool(windows.shapes(), batch_size, num_workers) if pooled else None

    def __getitem__(self, items: Sequence[int | tuple[int, int]]) -> dict[str, torch.Tensor] | SentBatch | Exception:
        try:
            return self._load(items)
        except (OwlError, OSError) as error:
            return error

    def _load(self, items: Sequence[int | tuple[int, int]]) -> dict[str, torch.Tensor] | SentBatch:
        worker = get_worker_info()
        if worker is None:
            return self.windows.batch(items)
        pool = self._pool
        if pool is None or (slot := pool.take(worker.id)) is None:
            batch = self.windows.empty(len(items))
            return SentBatch(self.windows.fill(items, batch), batch)
        batch = pool.tensors(slot, len(items))
        return SentBatch(self.windows.fill(items, batch), batch, pool, slot)


class BatchLoader(DataLoader):
    """A loader of `WindowBatches`, which raises returned errors and errors about dead workers."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:  # type: ignore[override]
        return self._checked(super().__iter__())  # immediately, not at the first batch

    def _checked(self, batches: Iterator[Any]) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                failure = worker_failure(error) if self.num_workers else None
                raise failure or error from error
            if isinstance(batch, Exception):
                raise batch
            yield batch


class ResumableLoader(BatchLoader):
    """A sized loader of training batches that tracks the position of its consumer, with any number of workers.

    ``state_dict`` counts the batches that were returned, without those prefetched by workers, and is the same on every
    rank. Lightning stores and restores it in mid-epoch checkpoints because it has a length and these two methods.

    Args:
        dataset: The windows.
        batches: The batch sampler.
        num_workers: Number of worker processes; they are persistent.
    """

    sampler: GlobalBatches

    def __init__(self, dataset: WindowDataset, batches: GlobalBatches, num_workers: int = 0) -> None:
        self._position = (0, 0)
        super().__init__(
            WindowBatches(dataset, batches.batch_size, num_workers),
            batch_size=None,
            sampler=batches,
            num_workers=num_workers,
            multiprocessing_context=START_METHOD if num_workers else None,
            persistent_workers=num_workers > 0,
            worker_init_fn=start_worker,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:  # type: ignore[override]
        """Yield the rest of the epoch after ``load_state_dict``, a whole epoch otherwise.

        An incomplete iteration does not advance the loader: the next iteration restarts the epoch, unless the trainer
        sets another one.
        """
        batches = self.sampler
        epoch, first = batches.epoch, batches.first
        # workers must start with SIGTERM blocked: threads that libraries start in them would handle it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            iterator = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        batches.first = 0
        for number, batch in enumerate(iterator, first + 1):
            # before the yield: a checkpoint saved during this batch counts it as done
            if number < len(self):
                self._position = (epoch, number)
            else:
                self._position = (epoch + 1, 0)
                batches.epoch = epoch + 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the next batch and the values that determine its contents."""
        epoch, batch = self._position
        batches = self.sampler
        return {"epoch": epoch, "batch": batch, **batches.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a stored position.

        Raises:
            OwlError: The position is within an epoch that was shuffled or divided into batches differently.
        """
        batches = self.sampler
        for name, found in batches.identity().items():
            if state["batch"] > 0 and state.get(name, found) != found:
                raise OwlError(
                    "loader.other-order",
                    f"the checkpoint stopped within an epoch with data {name} {state[name]}, now it is {found}; keep "
                    "it (global_batch is devices x batch_size, seed is seed_everything), or continue from a "
                    "checkpoint at the end of an epoch",
                )
        self._position = (state["epoch"], state["batch"])
        batches.epoch, batches.first = self._position


def evaluation_loader(
    dataset: WindowDataset, windows: int | None, batch_size: int, num_workers: int, rank: int, world_size: int
) -> DataLoader:
    """Return a loader of fixed windows without augmentation, each exactly once over all ranks.

    Args:
        dataset: The windows.
        windows: Number of windows, evenly spaced over the split; None or a larger number uses all.
        batch_size: Samples per batch.
        num_workers: Number of worker processes.
        rank: Rank of this process, below ``world_size``.
        world_size: Number of ranks. All get the same number of batches (sharded models hang otherwise), so the last
            batch may have one sample more than ``batch_size``.

    Raises:
        OwlError: There are fewer windows than ranks.
    """
    count = min(windows or len(dataset), len(dataset))
    if count < world_size:
        raise OwlError(
            "loader.too-few-windows",
            f"{count} of the {len(dataset)} windows of split {dataset.split!r} of {dataset.path} are measured by "
            f"{world_size} processes, expected at least one for each; raise validation_windows, use more data, or "
            "use fewer devices",
        )
    chosen = evenly_spaced(len(dataset), count)
    mine = chosen[rank::world_size]
    batches = max(1, -(-(count // world_size) // batch_size))
    starts = [number * batch_size for number in range(batches)]
    parts = [mine[start : start + batch_size] for start in starts[:-1]] + [mine[starts[-1] :]]
    return BatchLoader(
        WindowBatches(dataset, max(map(len, parts)), num_workers),
        batch_size=None,
        sampler=FixedBatches([part for part in parts if part]),
        num_workers=num_workers,
        multiprocessing_context=START_METHOD if num_workers else None,
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
    )


def start_worker(worker: int) -> None:
    """Initialize a worker process: one thread, and no signals except SIGTERM of the training process.

    Terminals and job schedulers signal all processes at once. The training process handles the signal by saving a
    checkpoint and needs batches until then; workers end only with it, or when it ends them.
    """
    single_threaded(worker)
    report_failures()
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which macOS lacks
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_on_sigterm_of_parent, daemon=True).start()


def _end_on_sigterm_of_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def single_threaded(worker: int) -> None:
    """Limit a worker process to one thread: parallelism comes from the number of workers."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
