"""Byte ranges of a dataset's shards: local files, any fsspec URL, or remote shards cached whole on local disk."""

import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from owl.data.shards import ShardIndex, shard_name
from owl.data.storage import answering, fetch_once, open_filesystem
from owl.errors import OwlError

MAX_OPEN_FILES = 64  # per process; a machine's limit is often 1,024


class ShardReader:
    """Reads ranges of bytes; one instance may be used in forked and in spawned loader workers.

    Args:
        url: The dataset's folder.
        cache_dir: Local folder that keeps whole copies of remote shards; None reads remote ranges directly.
            Ignored for local datasets.
        identity: The dataset's identity, so that a dataset that was made anew is not read from an old cache.
    """

    def __init__(self, url: str | Path, cache_dir: str | Path | None, identity: str) -> None:
        filesystem, self._path = open_filesystem(url)
        self.url = str(url)
        self._local = Path(self._path) if isinstance(filesystem, LocalFileSystem) else None
        self._cache = Path(cache_dir) / identity if cache_dir is not None and self._local is None else None
        self._files: OrderedDict[Path, int] = OrderedDict()
        self._remote: tuple[int, fsspec.AbstractFileSystem] | None = None

    def read(self, shard: int, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of a shard; fewer where the shard is cut short.

        Raises:
            OwlError: The shard is missing, or the storage does not answer.
        """
        name = shard_name(shard)
        with self._telling(name):
            if self._local is not None:
                return self._pread(self._local / name, start, stop)
            if self._cache is not None:
                return self._pread(self._cached(name), start, stop)
            return self._fetch(name, start, stop)

    def download(self, shards: list[int]) -> None:
        """Copy whole shards into the cache now, with a progress bar, rather than when they are first read.

        Raises:
            OwlError: As `read`.
        """
        if self._cache is not None:
            for shard in tqdm(shards, desc=f"downloading {self.url}", unit="shard", disable=not shards):
                with self._telling(shard_name(shard)):
                    self._cached(shard_name(shard))

    @contextmanager
    def _telling(self, name: str) -> Iterator[None]:
        """Tell in one sentence that a shard is missing or cannot be read."""
        try:
            with answering(f"{self.url}/{name}"):
                yield
        except FileNotFoundError as error:
            raise OwlError(
                "shard.member",
                f"{self.url} has no {name} though its index lists it; copy the shard back, or rebuild the index with "
                f"`python -m owl data verify {self.url} --repair`",
            ) from error

    def _pread(self, path: Path, start: int, stop: int) -> bytes:
        # pread keeps no position, so processes that were forked may share the descriptors; a memory map would turn a
        # shard that shrinks into SIGBUS
        file = self._files.get(path)
        if file is None:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._files[path] = file
            if len(self._files) > MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        else:
            self._files.move_to_end(path)
        return os.pread(file, stop - start, start)

    def _fetch(self, name: str, start: int, stop: int) -> bytes:
        filesystem, path = self._filesystem(), f"{self._path}/{name}"
        try:
            return filesystem.cat_file(path, start=start, end=stop)
        except FileNotFoundError:
            raise
        except Exception:
            # stores refuse a range that begins behind the end: that is a shard cut short, not a failing network
            size = filesystem.size(path)
            if size is not None and size <= start:
                return b""
            raise

    def _cached(self, name: str) -> Path:
        """Path of the local copy."""
        assert self._cache is not None
        return fetch_once(
            self._cache / name, lambda partial: self._filesystem().get_file(f"{self._path}/{name}", partial)
        )

    def _filesystem(self) -> fsspec.AbstractFileSystem:
        # file systems with an event loop (s3, http) do not survive a fork: each process opens its own
        if self._remote is None or self._remote[0] != os.getpid():
            self._remote = (os.getpid(), open_filesystem(self.url)[0])
        return self._remote[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_remote": None}

    def __del__(self) -> None:
        for file in self.__dict__.get("_files", {}).values():
            os.close(file)


def read_members(
    reader: ShardReader, index: ShardIndex, episode: int, frames: range, extensions: Sequence[str]
) -> tuple[list[dict[str, bytes]], str | None]:
    """Read consecutive frames at once, up to the first that has a damaged member.

    Args:
        reader: Of the dataset's shards.
        index: Of the dataset.
        episode: Its number.
        frames: Numbers within the episode, consecutive.
        extensions: Of the members to read.

    Returns:
        The members of each frame by extension, without those that it does not have; and what is wrong with the frame
        after them, None where nothing is.
    """
    columns = [index.extensions.tolist().index(extension) for extension in extensions]
    rows = int(index.episode_row[episode]) + np.arange(frames.start, frames.stop)
    offsets, sizes, sums = (table[rows][:, columns] for table in (index.offsets, index.sizes, index.checksums))
    there = sizes >= 0
    start = int(offsets[there].min(initial=2**62))  # where nothing is there: an empty range
    end = int((offsets + sizes)[there].max(initial=0))
    content = memoryview(reader.read(int(index.episode_shard[episode]), min(start, end), end))
    members: list[dict[str, bytes]] = []
    for frame, number in enumerate(frames):
        found = {}
        for column, extension in enumerate(extensions):
            if there[frame, column]:
                begin = int(offsets[frame, column]) - start
                found[extension] = bytes(content[begin : begin + int(sizes[frame, column])])
                if zlib.crc32(found[extension]) != sums[frame, column]:
                    return members, damage(index, episode, number, f"the checksum of its {extension} is wrong")
        members.append(found)
    return members, None


def damage(index: ShardIndex, episode: int, frame: int, reason: object) -> str:
    """Say which frame is damaged, and how."""
    return f"episode {index.episodes[episode]}, frame {frame} is damaged ({reason})"
