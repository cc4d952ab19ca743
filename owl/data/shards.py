"""The shard format: a folder of ``shard-%06d.tar``, one index and ``dataset.json`` (docs/reference/shards.md).

The tars are plain USTAR with WebDataset names, readable by other tools; with the index, a window of frames is one
contiguous byte range.
"""

import fcntl
import hashlib
import io
import json
import os
import re
import struct
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, Self

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from owl.atomic import PARTIAL_SUFFIX, atomic_write
from owl.data.npz import map_npz
from owl.data.storage import answering, fetch_once, lock, open_filesystem
from owl.errors import OwlError

FORMAT = "owl-shards"
VERSION = 1
INFO_NAME = "dataset.json"
INDEX_NAME = "index.npz"
BLOCK = 512  # tar's unit: headers are one block, contents are padded to whole blocks
SHARD = re.compile(r"shard-(?P<number>\d{6,})\.tar")
MEMBER = re.compile(r"(?P<episode>.+)/(?P<frame>\d{6,})\.(?P<extension>[^/]+)")


def shard_name(number: int) -> str:
    """Return the file name of a shard, e.g. ``shard-000012.tar``."""
    return f"shard-{number:06d}.tar"


def list_shards(filesystem: fsspec.AbstractFileSystem, path: str) -> dict[int, str]:
    """Return the path of each shard of a folder by its number, in order.

    Names are listed and compared, since a glob would interpret brackets in the folder's name as a pattern.
    """
    matches = ((name, SHARD.fullmatch(name.rpartition("/")[2])) for name in filesystem.ls(path, detail=False))
    return dict(sorted((int(match["number"]), name) for name, match in matches if match))


@contextmanager
def writing(root: str | Path, shared: bool = False, patience: float = 0.0) -> Iterator[None]:
    """Lock a dataset for writing; the lock is released when the process exits.

    Args:
        root: Local folder; its dataset.json is locked.
        shared: Whether to take a shared lock, as the workers of one recording do.
        patience: Seconds to wait for another process.

    Raises:
        OwlError: Another process is writing, or the file system has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with open(Path(root) / INFO_NAME, "r+b") as file:  # NFS requires write access for an exclusive lock
        deadline = time.monotonic() + patience
        while True:
            try:
                lock(file, kind | fcntl.LOCK_NB, root)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise OwlError(
                        "dataset.locked",
                        f"{root} is being written by another process; wait for it or use another folder",
                    ) from None
                time.sleep(0.1)
        yield


@dataclass
class DatasetInfo:
    """Contents of ``dataset.json``.

    Attributes:
        fps: Frames per second.
        size: (H, W) of the stored rgb frames.
        modalities: For each modality its member's extension, encoding, units and names, in member order.
        splits: Episode names of "train", "validation" and "test".
        source: How the dataset was produced; a resumed run compares it.
        code_version: Version of the code that wrote it.
    """

    fps: float
    size: tuple[int, int]
    modalities: dict[str, dict]
    splits: dict[str, list[str]]
    source: dict
    code_version: str

    @classmethod
    def load(cls, url: str | Path) -> Self:
        """Read and check the ``dataset.json`` of a folder.

        Raises:
            OwlError: The folder or the file is missing, is not JSON, lacks a key, or has another format or version.
        """
        filesystem, path = open_filesystem(url)
        try:
            with answering(url):
                text = filesystem.cat_file(f"{path}/{INFO_NAME}")
        except FileNotFoundError:
            found = f"{url} holds no {INFO_NAME}" if filesystem.exists(path) else f"there is no folder {url}"
            raise OwlError(
                "dataset.missing",
                f"{found}, expected a dataset; make one with `python -m owl data record` or `data import`",
            ) from None
        except NotADirectoryError:
            raise OwlError(
                "dataset.not-a-folder", f"{url} is a file, expected the folder of a dataset; give that"
            ) from None
        try:
            content: dict[str, Any] = json.loads(text)
            found_format, found_version = content.pop("format"), content.pop("version")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OwlError(
                "dataset.damaged", f"{url}/{INFO_NAME} is not a dataset description ({error!r}); make the dataset again"
            ) from error
        if (found_format, found_version) != (FORMAT, VERSION):
            raise OwlError(
                "dataset.version",
                f"{url} is {found_format} version {found_version}, this code reads {FORMAT} version {VERSION}; "
                "use the release of owl that wrote it or make the dataset again",
            )
        try:
            info = cls(**{**content, "size": tuple(content["size"])})
            for description in info.modalities.values():
                description["extension"]
        except (TypeError, KeyError) as error:
            raise OwlError(
                "dataset.damaged", f"{url}/{INFO_NAME} has missing or unknown keys ({error}); make the dataset again"
            ) from error
        return info

    def save(self, url: str | Path) -> None:
        """Write ``dataset.json`` into the folder, atomically; the folder is created if needed."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self), "size": list(self.size)}
        _write_file(url, INFO_NAME, (json.dumps(content, indent=2) + "\n").encode())

    def identity(self, index: "ShardIndex") -> str:
        """Return a hash of sixteen hexadecimal digits of the description, the splits and all members' checksums.

        It does not depend on the source and the code version: equal samples have equal identities.
        """
        content = asdict(self)
        del content["source"], content["code_version"]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        for array in (index.episodes, index.episode_frames, index.offsets, index.sizes, index.checksums):
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)  # without a copy of it
        return digest.hexdigest()[:16]


class ShardWriter:
    """Write one shard into a local folder, with equal bytes for equal members.

    The tar is written to ``shard-%06d.tar.partial`` and renamed when the ``with`` block ends without an error;
    otherwise it is removed.
    """

    def __init__(self, root: str | Path, number: int) -> None:
        self._path = Path(root) / shard_name(number)
        self._partial = self._path.with_name(self._path.name + PARTIAL_SUFFIX)
        self._file: BinaryIO | None = None
        self._previous: tuple[str, int] | None = None

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._partial, "wb")
        return self

    def write(self, episode: str, frame: int, members: dict[str, bytes]) -> None:
        """Append one frame.

        Args:
            episode: Name of the episode; all its frames go into this shard, one after another.
            frame: Index of the frame, 0 for the first of an episode, otherwise one more than the previous.
            members: Contents by extension, e.g. ``{"rgb.jpg": ...}``, written in this order.

        Raises:
            ValueError: A frame is out of order, or a name is longer than USTAR can hold.
        """
        if self._file is None:
            raise ValueError("ShardWriter.write was called outside its `with` block")
        expected = self._previous[1] + 1 if self._previous and self._previous[0] == episode else 0
        if frame != expected:
            raise ValueError(f"frame {frame} of episode {episode} was written, expected frame {expected}")
        self._previous = (episode, frame)
        for extension, content in members.items():
            header = tarfile.TarInfo(f"{episode}/{frame:06d}.{extension}")
            header.size = len(content)  # time, owner and group stay 0: the bytes depend only on the members
            self._file.write(header.tobuf(tarfile.USTAR_FORMAT))
            self._file.write(content)
            self._file.write(bytes(-len(content) % BLOCK))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            with self._file as file:
                if kind is None:
                    file.write(bytes(2 * BLOCK))
                    file.flush()
                    os.fsync(file.fileno())
            if kind is None:
                os.replace(self._partial, self._path)
        finally:
            self._file = None
            self._partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class ShardIndex:
    """Positions of all members. F frames (rows) in shard, episode and time order, M modalities (columns), E episodes.

    Attributes:
        extensions: str[M], in the order of the dataset's modalities.
        episodes: str[E] names.
        episode_shard: int64[E], number of the episode's shard.
        episode_row: int64[E], row of its first frame.
        episode_frames: int64[E], number of frames.
        offsets: int64[F, M], position of the member's content in its shard, in bytes; -1 if absent.
        sizes: int64[F, M], bytes of the content; -1 if absent.
        checksums: uint32[F, M], CRC-32 of the content.
        shards: int64[S], numbers of the shards.
        shard_bytes: int64[S], their file sizes.
        origin: The URL, ``cache_dir`` and checksums of the file that the arrays are mapped from, if they are.
    """

    extensions: np.ndarray
    episodes: np.ndarray
    episode_shard: np.ndarray
    episode_row: np.ndarray
    episode_frames: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    checksums: np.ndarray
    shards: np.ndarray
    shard_bytes: np.ndarray
    origin: tuple[str, str | Path | None, tuple[int, ...]] | None = field(default=None, repr=False)

    @property
    def frames(self) -> int:
        """Number of frames, F."""
        return int(self.episode_frames.sum())

    @classmethod
    def load(cls, url: str | Path, cache_dir: str | Path | None = None, check: bool = True) -> Self:
        """Map a dataset's index into memory; its arrays are read-only.

        It takes 20 bytes per member: processes of a machine share the pages of a local file, and worker processes open
        it again instead of receiving a copy.

        Args:
            url: The dataset's folder.
            cache_dir: Local folder that keeps the index of a remote dataset, for all processes; None fetches it into
                a temporary file.
            check: Whether to compare its checksums.

        Raises:
            OwlError: It is missing (the dataset is unfinished), damaged, or of another version.
        """
        repair = f"rebuild it with `python -m owl data verify {url} --repair`"
        try:
            with _open_index(url, cache_dir) as file:
                arrays, checksums = map_npz(file, check)
            version = int(arrays.pop("version"))
        except FileNotFoundError:
            raise OwlError(
                "index.missing",
                f"{url} has no {INDEX_NAME}, so it is unfinished; finish it by running the command that made it again, "
                f"or, if its shards are complete, {repair}",
            ) from None
        except (ValueError, KeyError, EOFError, struct.error, zipfile.BadZipFile) as error:
            raise OwlError("index.damaged", f"{url}/{INDEX_NAME} is damaged ({error}); {repair}") from error
        if version != VERSION:
            raise OwlError(
                "index.version", f"{url}/{INDEX_NAME} is version {version}, this code reads version {VERSION}; {repair}"
            )
        try:
            return cls(**arrays, origin=(str(url), cache_dir, checksums))
        except TypeError as error:
            raise OwlError(
                "index.damaged", f"{url}/{INDEX_NAME} has missing or unknown arrays ({error}); {repair}"
            ) from error

    def save(self, url: str | Path) -> None:
        """Write the index into the folder, atomically."""
        arrays = {name: array for name, array in vars(self).items() if name != "origin"}

        def write(file: IO[bytes]) -> None:
            np.savez(file, version=np.int64(VERSION), **arrays)

        filesystem, path = open_filesystem(url)
        if isinstance(filesystem, LocalFileSystem):
            atomic_write(Path(path) / INDEX_NAME, write)
        else:
            write(buffer := io.BytesIO())
            _write_file(url, INDEX_NAME, buffer.getvalue())

    def frames_of_shards(self) -> dict[int, int]:
        """Return the frames of each shard by its number."""
        place = np.searchsorted(self.shards, self.episode_shard)
        frames = np.bincount(place, self.episode_frames, len(self.shards))
        return dict(zip(self.shards.tolist(), frames.astype(int).tolist(), strict=True))

    def episodes_of(self, shard: int) -> list[int]:
        """Return the numbers of a shard's episodes, in the order of the shard."""
        episodes = np.flatnonzero(self.episode_shard == shard)
        return episodes[np.argsort(self.episode_row[episodes])].tolist()

    def __reduce__(self) -> tuple[Any, ...]:
        if self.origin is None:
            return type(self), tuple(getattr(self, item.name) for item in fields(self))
        return _reopen, self.origin


def _reopen(url: str, cache_dir: str | Path | None, checksums: tuple[int, ...]) -> ShardIndex:
    """Map an index in another process."""
    index = ShardIndex.load(url, cache_dir, check=False)
    assert index.origin is not None
    if index.origin[2] != checksums:
        raise OwlError(
            "index.changed",
            f"{url}/{INDEX_NAME} has changed since this run started; start the run again",
        )
    return index


def _open_index(url: str | Path, cache_dir: str | Path | None) -> BinaryIO:
    """Open the index of a folder, or a local copy of a remote index."""
    filesystem, path = open_filesystem(url)
    remote = f"{path}/{INDEX_NAME}"
    with answering(url):
        if isinstance(filesystem, LocalFileSystem):
            return open(remote, "rb")
        if cache_dir is None:
            with tempfile.TemporaryDirectory(prefix="owl-index-") as scratch:  # an open file outlives its name
                filesystem.get_file(remote, f"{scratch}/{INDEX_NAME}")
                return open(f"{scratch}/{INDEX_NAME}", "rb")
        # a rebuilt index has another size, time or tag
        state = hashlib.sha256(repr((str(url), sorted(filesystem.info(remote).items()))).encode()).hexdigest()
        local = Path(cache_dir) / f"index-{state[:16]}.npz"
        return open(fetch_once(local, lambda partial: filesystem.get_file(remote, partial)), "rb")


def _write_file(url: str | Path, name: str, content: bytes) -> None:
    filesystem, path = open_filesystem(url)
    if isinstance(filesystem, LocalFileSystem):
        atomic_write(Path(path) / name, content)
    else:
        filesystem.pipe_file(f"{path}/{name}", content)  # object stores and memory replace a file as a whole
