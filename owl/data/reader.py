"""Reader of byte ranges of shards: local files, any fsspec URL, or remote shards cached on local disk."""

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
    """Reader of byte ranges; one instance can be used in forked and in spawned worker processes.

    Args:
        url: The dataset's folder.
        cache_dir: Local folder for complete copies of remote shards; None reads remote ranges directly.
            Ignored for local datasets.
        identity: The dataset's identity, so that a rebuilt dataset is not read from an old cache.
    """

    def __init__(self, url: str | Path, cache_dir: str | Path | None, identity: str) -> None:
        filesystem, self._path = open_filesystem(url)
        self.url = str(url)
        self._local = Path(self._path) if isinstance(filesystem, LocalFileSystem) else None
        self._cache = Path(cache_dir) / identity if cache_dir is not None and self._local is None else None
        self._files: OrderedDict[Path, int] = OrderedDict()
        self._remote: tuple[int, fsspec.AbstractFileSystem] | None = None

    def read(self, shard: int, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of a shard; fewer if the shard is truncated.

        Raises:
            OwlError: The shard is missing, or the storage cannot be read.
        """
        name = shard_name(shard)
        with self._reporting(name):
            if self._local is not None:
                return self._pread(self._local / name, start, stop)
            if self._cache is not None:
                return self._pread(self._cached(name), start, stop)
            return self._fetch(name, start, stop)

    def download(self, shards: list[int]) -> None:
        """Copy complete shards into the cache now, with a progress bar, rather than at the first read.

        Raises:
            OwlError: As `read`.
        """
        if self._cache is not None:
            for shard in tqdm(shards, desc=f"downloading {self.url}", unit="shard", disable=not shards):
                with self._reporting(shard_name(shard)):
                    self._cached(shard_name(shard))

    @contextmanager
    def _reporting(self, name: str) -> Iterator[None]:
        """Raise an OwlError if a shard is missing or cannot be read."""
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
            # stores reject a range that starts after the end: the shard is truncated, the network has not failed
            size = filesystem.size(path)
            if size is not None and size <= start:
                return b""
            raise

    def _cached(self, name: str) -> Path:
        """Return the path of the local copy."""
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
    """Read consecutive frames with one read, up to the first frame with a damaged member.

    Args:
        reader: Reader of the dataset's shards.
        index: Index of the dataset.
        episode: Number of the episode.
        frames: Consecutive frame indices within the episode.
        extensions: Extensions of the members to read.

    Returns:
        The members of each frame by extension, without absent members; and the problem of the next frame, None if all
        frames were read.
    """
    columns = [index.extensions.tolist().index(extension) for extension in extensions]
    rows = int(index.episode_row[episode]) + np.arange(frames.start, frames.stop)
    offsets, sizes, sums = (table[rows][:, columns] for table in (index.offsets, index.sizes, index.checksums))
    there = sizes >= 0
    start = int(offsets[there].min(initial=2**62))  # without members: an empty range
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
    """Return a message with the damaged frame and the reason."""
    return f"episode {index.episodes[episode]}, frame {frame} is damaged ({reason})"
