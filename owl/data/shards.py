"""The shard format: a folder of ``shard-%06d.tar``, one index and ``dataset.json`` (docs/reference/shards.md).

The tars are plain USTAR with WebDataset names, so other tools read them; the index is what makes a window of frames
one contiguous byte range.
"""

import fcntl
import hashlib
import io
import json
import os
import re
import tarfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from owl.atomic import PARTIAL_SUFFIX, atomic_write
from owl.errors import OwlError

FORMAT = "owl-shards"
VERSION = 1
INFO_NAME = "dataset.json"
INDEX_NAME = "index.npz"
BLOCK = 512  # tar's unit: headers are one block, contents are padded to whole blocks
MEMBER = re.compile(r"(?P<episode>.+)/(?P<frame>\d{6,})\.(?P<extension>[^/]+)")


def open_filesystem(url: str | Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """Split a folder's URL into its fsspec file system and the path inside it.

    Raises:
        OwlError: The protocol is unknown or its package is not installed.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(str(url))
    except (ImportError, ValueError) as error:
        raise OwlError(
            "storage.protocol", f"{url} cannot be opened ({error}); install the protocol's package or use a local path"
        ) from error
    return filesystem, path.rstrip("/")


@contextmanager
def answering(url: str | Path) -> Iterator[None]:
    """Tell in one sentence that a storage does not answer; that a file is not there stays an error of its own.

    Raises:
        OwlError: Whatever else went wrong inside.
    """
    try:
        yield
    except (OwlError, FileNotFoundError, NotADirectoryError):
        raise
    except Exception as error:  # the packages of the protocols raise types of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OwlError(
            "storage.unreadable", f"{url} could not be read ({reason}); check the connection and your rights"
        ) from error


def shard_name(number: int) -> str:
    """File name of a shard, e.g. ``shard-000012.tar``."""
    return f"shard-{number:06d}.tar"


@contextmanager
def writing(root: str | Path, shared: bool = False, patience: float = 0.0) -> Iterator[None]:
    """Keep other processes from writing the same shards; the lock goes when the process dies.

    Args:
        root: Local folder with its dataset.json, which is what is locked.
        shared: Whether others that share may write too, as the workers of one recording do.
        patience: Seconds to wait for another process to end.

    Raises:
        OwlError: Another process is writing.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with open(Path(root) / INFO_NAME, "r+b") as file:  # NFS locks for writing what is open for it
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
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
    """What ``dataset.json`` says.

    Attributes:
        fps: Frames per second.
        size: (H, W) of the stored rgb frames.
        modalities: For each modality its member's extension, encoding, units and names, in member order.
        splits: Episode names of "train", "validation" and "test".
        source: Whatever produced the dataset; a resumed run compares it.
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
                f"{found}, a dataset was expected; make one with `python -m owl data record` or `data import`",
            ) from None
        except NotADirectoryError:
            raise OwlError(
                "dataset.not-a-folder", f"{url} is a file, the folder of a dataset was expected; give that"
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
                "dataset.damaged", f"{url}/{INFO_NAME} lacks or adds a key ({error}); make the dataset again"
            ) from error
        return info

    def save(self, url: str | Path) -> None:
        """Write ``dataset.json`` into the folder, atomically; the folder is made where needed."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self), "size": list(self.size)}
        _write_file(url, INFO_NAME, (json.dumps(content, indent=2) + "\n").encode())

    def identity(self, index: "ShardIndex") -> str:
        """Sixteen hexadecimal digits that change with the samples: description, splits and every member's checksum.

        How and by which code version the dataset was made is left out: equal samples have equal identities.
        """
        content = asdict(self)
        del content["source"], content["code_version"]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        for array in (index.episodes, index.episode_frames, index.offsets, index.sizes, index.checksums):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


def begin_dataset(root: Path, info: DatasetInfo) -> DatasetInfo:
    """Write ``dataset.json`` where there is none, and return the one that is there then.

    Raises:
        OwlError: Shards lie there that belong to no dataset.
    """
    if (root / INFO_NAME).exists():
        return DatasetInfo.load(root)
    if any(root.glob("shard-*.tar")):
        raise OwlError("dataset.occupied", f"{root} holds shards but no {INFO_NAME}; give an empty folder")
    info.save(root)
    return info


class ShardWriter:
    """Writes one shard into a local folder, equal bytes for equal members.

    The tar grows under ``shard-%06d.tar.partial`` and takes its name when the ``with`` block ends without an error;
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
            frame: Number of the frame, 0 for an episode's first and one more than the previous otherwise.
            members: Contents by extension, e.g. ``{"rgb.jpg": ...}``, written in this order.

        Raises:
            ValueError: A frame is out of order, or a name is longer than USTAR can hold.
        """
        if self._file is None:
            raise ValueError("ShardWriter.write was called outside its `with` block")
        expected = self._previous[1] + 1 if self._previous and self._previous[0] == episode else 0
        if frame != expected:
            raise ValueError(f"frame {frame} of episode {episode} was written where frame {expected} was expected")
        self._previous = (episode, frame)
        for extension, content in members.items():
            header = tarfile.TarInfo(f"{episode}/{frame:06d}.{extension}")
            header.size = len(content)  # time, owner and group stay 0: the bytes depend on the members alone
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
    """Where every member lies. F frames (rows) in shard, episode and time order, M modalities (columns), E episodes.

    Attributes:
        extensions: str[M], in the order of the dataset's modalities.
        episodes: str[E] names.
        episode_shard: int64[E], number of the shard that holds the episode.
        episode_row: int64[E], row of its first frame.
        episode_frames: int64[E], number of frames.
        offsets: int64[F, M], position of the member's content in its shard, in bytes; -1 where it is absent.
        sizes: int64[F, M], bytes of the content; -1 where it is absent.
        checksums: uint32[F, M], CRC-32 of the content.
        shards: int64[S], numbers of the shards.
        shard_bytes: int64[S], their file sizes.
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

    @classmethod
    def load(cls, url: str | Path) -> Self:
        """Read a dataset's index.

        Raises:
            OwlError: It is missing (the dataset is unfinished), damaged, or of another version.
        """
        filesystem, path = open_filesystem(url)
        repair = f"rebuild it with `python -m owl data verify {url} --repair`"
        try:
            with answering(url):
                data = filesystem.cat_file(f"{path}/{INDEX_NAME}")
        except FileNotFoundError:
            raise OwlError(
                "index.missing",
                f"{url} has no {INDEX_NAME}, so it is unfinished; finish it by running the command that made it again, "
                f"or, if its shards are complete, {repair}",
            ) from None
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            version = int(arrays.pop("version"))
        except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise OwlError("index.damaged", f"{url}/{INDEX_NAME} is damaged ({error}); {repair}") from error
        if version != VERSION:
            raise OwlError(
                "index.version", f"{url}/{INDEX_NAME} is version {version}, this code reads version {VERSION}; {repair}"
            )
        try:
            return cls(**arrays)
        except TypeError as error:
            raise OwlError("index.damaged", f"{url}/{INDEX_NAME} lacks or adds an array ({error}); {repair}") from error

    def save(self, url: str | Path) -> None:
        """Write the index into the folder, atomically."""
        buffer = io.BytesIO()
        np.savez(buffer, version=np.int64(VERSION), **vars(self))
        _write_file(url, INDEX_NAME, buffer.getvalue())


def write_index(root: str | Path) -> ShardIndex:
    """Write the index of a folder that can be written, as `scan_shards` finds it, and return it."""
    index = scan_shards(root)
    index.save(root)
    return index


def scan_shards(root: str | Path) -> ShardIndex:
    """Index all complete shards of a folder in order. ``dataset.json`` must exist.

    A shard that is cut short is indexed up to its last whole frame, with a warning.

    Args:
        root: The dataset's folder, any fsspec URL.

    Raises:
        OwlError: There is no shard, a member's name is not of this format, or an episode's frames are not 0..n-1.
    """
    info = DatasetInfo.load(root)
    filesystem, path = open_filesystem(root)
    columns = {description["extension"]: column for column, description in enumerate(info.modalities.values())}
    shards = sorted(filesystem.glob(f"{path}/shard-*.tar"))
    if not shards:
        raise OwlError(
            "shard.none", f"{root} holds no shard-*.tar, at least one was expected; run the command that makes it again"
        )
    episodes: dict[str, tuple[int, int]] = {}  # name: (shard, first row)
    rows: list[list[tuple[int, int, int]]] = []
    numbers = [int(Path(shard).stem.removeprefix("shard-")) for shard in shards]
    for number, shard in zip(numbers, shards, strict=True):
        previous: tuple[str, int] | None = None
        for name, offset, size, checksum in _scan(filesystem, shard):
            match = MEMBER.fullmatch(name)
            if not match:
                raise OwlError(
                    "shard.member",
                    f"{shard} holds {name}, <episode>/<frame>.<extension> was expected; remove that shard",
                )
            episode, frame = match["episode"], int(match["frame"])
            if (episode, frame) != previous:
                expected = previous[1] + 1 if previous and previous[0] == episode else 0
                if frame != expected or (frame == 0 and episode in episodes):
                    raise OwlError(
                        "shard.order",
                        f"{shard} holds frame {frame} of episode {episode}, frame {expected} of an episode that lies "
                        "nowhere else was expected; make the dataset again",
                    )
                if frame == 0:
                    episodes[episode] = (number, len(rows))
                rows.append([(-1, -1, 0)] * len(columns))
                previous = (episode, frame)
            if match["extension"] in columns:
                rows[-1][columns[match["extension"]]] = (offset, size, checksum)
    first = np.array([row for _, row in episodes.values()], np.int64)
    table = np.array(rows, np.int64).reshape(len(rows), len(columns), 3)
    return ShardIndex(
        extensions=np.array(list(columns), str),
        episodes=np.array(list(episodes), str),
        episode_shard=np.array([shard for shard, _ in episodes.values()], np.int64),
        episode_row=first,
        episode_frames=np.diff(first, append=len(rows)),
        offsets=table[..., 0].copy(),
        sizes=table[..., 1].copy(),
        checksums=table[..., 2].astype(np.uint32),
        shards=np.array(numbers, np.int64),
        shard_bytes=np.array([filesystem.size(shard) for shard in shards], np.int64),
    )


def _scan(filesystem: fsspec.AbstractFileSystem, shard: str) -> Iterator[tuple[str, int, int, int]]:
    """Yield (name, offset, size, CRC-32) of a tar's members; of a damaged tar those of the frames that are whole."""
    frame: list[tuple[str, int, int, int]] = []
    with filesystem.open(shard, "rb") as file:
        while True:
            block = file.read(BLOCK)
            if block == bytes(BLOCK):
                break
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
                content = file.read(header.size)
                if len(content) < header.size:
                    raise EOFError(f"{header.name} is cut short")
            except (tarfile.HeaderError, UnicodeDecodeError, EOFError) as error:
                # the last frame may lack members that the lost part held
                lost = _frame_name(frame[0][0]) if frame else "its first frame"
                warnings.warn(f"{shard} is damaged ({error}): frames from {lost} on are left out", stacklevel=2)
                return
            if frame and _frame_name(frame[0][0]) != _frame_name(header.name):
                yield from frame
                frame.clear()
            frame.append((header.name, file.tell() - header.size, header.size, zlib.crc32(content)))
            file.seek(-header.size % BLOCK, os.SEEK_CUR)
    yield from frame


def _frame_name(member: str) -> str:
    """``<episode>/<frame>`` of a member's name; the episode may contain dots."""
    episode, _, rest = member.rpartition("/")
    return f"{episode}/{rest.partition('.')[0]}"


def _write_file(url: str | Path, name: str, content: bytes) -> None:
    filesystem, path = open_filesystem(url)
    if isinstance(filesystem, LocalFileSystem):
        atomic_write(Path(path) / name, content)
    else:
        filesystem.pipe_file(f"{path}/{name}", content)  # object stores and memory replace a file as a whole
