"""Resumable writing of datasets shard by shard, in one or several processes.

A job (`ShardJob`) describes a dataset and yields the frames of each shard; `run` writes them. The progress is stored
only in the folder: ``dataset.json`` is written first, complete shards get their final names, and ``index.npz`` is
written last. A killed run therefore continues when it is called again, and produces the same bytes.
"""

import errno
import fcntl
import functools
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import cv2
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from owl.atomic import PARTIAL_SUFFIX
from owl.data.scan import scan_shards
from owl.data.shards import INDEX_NAME, INFO_NAME, DatasetInfo, ShardIndex, ShardWriter, shard_name, writing
from owl.data.storage import lock, open_filesystem
from owl.errors import OwlError
from owl.process import prepare_process

LOCK_NAME = "writing.lock"
LOCK_PATIENCE = 5.0  # seconds; the worker processes of a killed run need some time to exit
Frames = Generator[tuple[str, dict[str, bytes]], None, None]
"""The name of the episode and the members by extension, for each frame."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Made:
    """An input file or folder, identified by a hash of its content independent of its path.

    Attributes:
        identity: The hash.
        path: Its path, for messages.
    """

    identity: str
    path: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.path} ({self.identity})"


class ShardJob(ABC):
    """Base class of jobs that write a dataset. With several processes it must be picklable; each process has one copy.

    Attributes:
        doing: Label of the progress bar.
        kinds: Kinds of dataset (``source["kind"]`` in dataset.json) that it writes.
        info: Initial description of the dataset.
        shards: Expected frames of each shard by its number; a shard may have fewer.
    """

    doing: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    info: DatasetInfo
    shards: dict[int, int]

    @abstractmethod
    def settings(self, info: DatasetInfo) -> dict[str, Any]:
        """Return the settings that determine the bytes, by name, from the description of a dataset of the job's kinds.

        Continuing a dataset with different settings is an error that names the first difference.
        """

    @abstractmethod
    def frames(self, number: int) -> Frames:
        """Yield the frames of a shard in order."""

    def is_described(self, info: DatasetInfo) -> bool:
        """Return whether `describe` has completed a description."""
        return True

    def describe(self, root: Path, info: DatasetInfo, index: ShardIndex) -> DatasetInfo:
        """Return the description completed with values that require all shards; idempotent."""
        return info

    def prepare(self, threads: int) -> None:  # noqa: B027  (most jobs need nothing)
        """Initialize a worker process, once, before its first shard.

        Args:
            threads: Number of threads of the worker, its share of the machine's cores.
        """

    @staticmethod  # noqa: B027
    def clean_up(scratch: str) -> None:
        """Clean up after a killed worker, such as its child processes.

        Args:
            scratch: The temporary folder of the workers.
        """


def local_folder(path: str | Path) -> Path:
    """Return the output folder of a job as an absolute path; it need not exist.

    Raises:
        OwlError: The path is remote, or a file.
    """
    filesystem, folder = open_filesystem(path)
    if not isinstance(filesystem, LocalFileSystem):
        raise OwlError(
            "dataset.not-local",
            f"{path} is not a local folder; write to a local folder and copy the dataset afterwards",
        )
    if Path(folder).is_file():
        raise OwlError("dataset.not-a-folder", f"{path} is a file, expected a folder; give another path")
    return Path(folder)


def run(job: ShardJob, root: Path, workers: int = 0) -> DatasetInfo:
    """Write a dataset, or finish one that was interrupted; a finished dataset is not changed.

    If another process is writing it, wait: all trials of a sweep and all nodes of a cluster start with the recording.

    Args:
        job: The job.
        root: The folder (`local_folder`), created if needed.
        workers: Number of worker processes; 0 writes in this process.

    Returns:
        The description of the finished dataset.

    Raises:
        OwlError: The folder has other contents, was started with other settings, is still being written by workers of
            a killed run or cannot be written, or a worker died. Complete shards are kept, and the same call continues.
    """
    try:
        if (root / INDEX_NAME).exists():
            info = _begin(root, job)
            if _is_finished(root, job, info):
                return info  # without a lock: the disk may be read-only
        with _alone(root):
            info = _begin(root, job)
            with writing(root, patience=LOCK_PATIENCE):
                pass  # the workers of a run that was killed have exited
            if not _is_finished(root, job, info):  # unless the other process has finished it
                _write_missing(root, job, workers)
                info = _finish(root, job, info)
    except OSError as error:
        action = "make room" if error.errno in FULL else "give a folder that can be written"
        raise OwlError(
            "dataset.unwritable",
            f"{root} cannot be written ({error.strerror or error}); {action}, then run the same command again: "
            "complete shards are kept",
        ) from error
    return info


def _is_finished(root: Path, job: ShardJob, info: DatasetInfo) -> bool:
    files = (root / name for name in (INDEX_NAME, *map(shard_name, job.shards)))
    return all(file.exists() for file in files) and job.is_described(info)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the lock of a job's folder; wait if another process holds it. It is released when the process exits."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / LOCK_NAME
    while True:
        with open(path, "ab") as file:
            try:
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, root)
            except BlockingIOError:
                print(f"{root} is being written by another process; waiting for it", file=sys.stderr, flush=True)
                lock(file, fcntl.LOCK_EX, root)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # the other process has removed this lock file
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _begin(root: Path, job: ShardJob) -> DatasetInfo:
    """Write dataset.json, or compare an existing one with the job."""
    if not (root / INFO_NAME).exists():
        if any(root.glob("shard-*.tar")):
            raise OwlError(
                "dataset.occupied",
                f"{root} holds shards but no {INFO_NAME}, expected an empty folder; give another folder",
            )
        job.info.save(root)
        return job.info
    info = DatasetInfo.load(root)
    if info.source.get("kind") not in job.kinds:
        raise OwlError(
            "dataset.occupied",
            f"{root} holds a dataset of kind {info.source.get('kind')}, expected an empty folder or one of "
            f"kind {' or '.join(job.kinds)}; give another folder",
        )
    stored, wanted = job.settings(info), job.settings(job.info)
    for name in wanted | stored:
        before, now = stored.get(name, "missing"), wanted.get(name, "missing")
        if before != now:
            raise OwlError(
                "dataset.other-settings",
                f"{root} was started with {name} {before}, now it is {now}; use the same as before to finish it, or "
                "give another folder",
            )
    return info


def _finish(root: Path, job: ShardJob, info: DatasetInfo) -> DatasetInfo:
    index = scan_shards(root)
    complete = job.describe(root, info, index)
    if complete != info:
        complete.save(root)
    index.save(root)
    return complete


def _write_missing(root: Path, job: ShardJob, workers: int) -> None:
    missing = [number for number in job.shards if not (root / shard_name(number)).exists()]
    total = sum(job.shards.values())
    done = total - sum(job.shards[number] for number in missing)
    # only this process draws: tqdm's own lock is shared with forked processes, and stays held if one of them is killed
    tqdm.set_lock(threading.RLock())
    with tqdm(total=total, initial=done, unit="frame", desc=job.doing) as bar:
        if workers and missing:
            _write_with_workers(root, job, missing, min(workers, len(missing)), bar)
            return
        for number in missing:
            _write_shard(root, job, number, bar.update)


def _write_shard(root: Path, job: ShardJob, number: int, count: Callable[[int], object]) -> None:
    """Write one shard; ``count`` is called with the number of frames written since its last call."""
    previous, frame, left = None, 0, job.shards[number]
    with (
        writing(root, shared=True, patience=LOCK_PATIENCE),
        ShardWriter(root, number) as writer,
        closing(job.frames(number)) as frames,
    ):
        for episode, members in frames:
            frame = frame + 1 if episode == previous else 0
            previous = episode
            writer.write(episode, frame, members)
            left -= 1
            count(1)
    count(left)


def _write_with_workers(root: Path, job: ShardJob, missing: list[int], workers: int, bar: tqdm) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the caller's threads
    # one counter per shard: the lock of a shared counter would never be released if its holder were killed
    counts, stop = context.RawArray("q", len(missing)), context.Event()
    done = bar.n
    with tempfile.TemporaryDirectory(prefix="owl-job-") as scratch:
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        # pickled here, so that an error of unpickling in a worker is reported instead of ending the worker
        common = (root, pickle.dumps(job), threads, counts, stop)
        pool = ProcessPoolExecutor(workers, context, _start_worker, (common, os.getpid(), job.clean_up, scratch))
        try:
            pending: set[Future] = {pool.submit(_work, number, place) for place, number in enumerate(missing)}
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                bar.update(done + sum(counts) - bar.n)
                for future in finished:
                    for message, category in future.result():
                        warnings.warn(message, category, stacklevel=2)
        except BrokenProcessPool as error:
            raise OwlError(
                "worker.killed",
                f"a process that wrote {root} was killed, perhaps because memory ran out; complete shards are kept, "
                "run the same command again to continue, with fewer workers if memory is short",
            ) from error
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            job.clean_up(scratch)
            for partial in root.glob(f"shard-*{PARTIAL_SUFFIX}"):
                partial.unlink(missing_ok=True)


# The following runs in the worker processes.

_common: tuple[Path, bytes, int, Any, Any]


class _StoppedError(Exception):
    """The parent process has stopped the job; the shard is discarded."""


def _start_worker(
    common: tuple[Path, bytes, int, Any, Any], parent: int, clean_up: Callable[[str], None], scratch: str
) -> None:
    global _common
    _common = common
    prepare_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which stops the workers
    cv2.setNumThreads(1)  # the cores are busy with the other workers
    tempfile.tempdir = scratch
    # a child process that inherited the sentinel pipe would hide the exit of this process from the parent
    for descriptor in os.listdir("/dev/fd"):
        with suppress(OSError):  # the listing's own descriptor is closed by now
            os.set_inheritable(int(descriptor), int(descriptor) <= 2)
    threading.Thread(target=_die_with, args=(parent, clean_up, scratch), daemon=True).start()


def _die_with(parent: int, clean_up: Callable[[str], None], scratch: str) -> None:
    """End this process and its child processes when the parent exits for any reason."""
    while os.getppid() == parent:
        time.sleep(0.2)
    clean_up(scratch)
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


@functools.cache
def _job() -> ShardJob:
    _, job, threads, _, _ = _common
    loaded: ShardJob = pickle.loads(job)
    loaded.prepare(threads)
    return loaded


def _work(number: int, place: int) -> list[tuple[str, type[Warning]]]:
    """Write one shard; return its warnings, which the parent issues."""
    root, _, _, counts, stop = _common

    def count(frames: int) -> None:
        counts[place] += frames
        if stop.is_set():
            raise _StoppedError

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _write_shard(root, _job(), number, count)
    return [(str(warning.message), warning.category) for warning in caught]
