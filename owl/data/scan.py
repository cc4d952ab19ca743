"""Indexing of a folder of shards, including shards repacked with `tar`."""

import tarfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import fsspec
import numpy as np

from owl.data.shards import BLOCK, MEMBER, DatasetInfo, ShardIndex, list_shards
from owl.data.storage import open_filesystem
from owl.errors import OwlError

ABSENT = (-1, -1, 0)


def write_index(root: str | Path) -> ShardIndex:
    """Scan a writable folder with `scan_shards`, write the index and return it."""
    index = scan_shards(root)
    index.save(root)
    return index


def scan_shards(root: str | Path) -> ShardIndex:
    """Index all complete shards of a folder in order. ``dataset.json`` must exist.

    A truncated shard is indexed up to its last complete frame, with a warning. A shard whose frames are not in time
    order is indexed with a warning, since it takes longer to read.

    Args:
        root: The dataset's folder, any fsspec URL.

    Raises:
        OwlError: There are no shards, a member's name is invalid, or an episode's frames are not 0..n-1 or are in two
            shards.
    """
    info = DatasetInfo.load(root)
    filesystem, path = open_filesystem(root)
    extensions = [description["extension"] for description in info.modalities.values()]
    shards = list_shards(filesystem, path)
    if not shards:
        raise OwlError(
            "shard.none", f"{root} holds no shard-*.tar, expected at least one; run the command that makes it again"
        )
    shard_of: dict[str, int] = {}
    tables: list[np.ndarray] = []  # one per episode: a list of all members would take ten times as much memory
    for number, shard in shards.items():
        for episode, table in _scan_shard(filesystem, shard, extensions):
            if episode in shard_of:
                raise OwlError(
                    "shard.order",
                    f"{shard} holds frame 0 of episode {episode}, which {shards[shard_of[episode]]} also holds, "
                    "expected each episode in one shard; remove one of them",
                )
            shard_of[episode] = number
            tables.append(table)
    frames = np.array([len(table) for table in tables], np.int64)
    empty = np.zeros((0, len(extensions), 3), np.int64)
    offsets, sizes, checksums = (np.concatenate([t[..., i] for t in tables] or [empty[..., i]]) for i in range(3))
    return ShardIndex(
        extensions=np.array(extensions, str),
        episodes=np.array(list(shard_of), str),
        episode_shard=np.array(list(shard_of.values()), np.int64),
        episode_row=np.cumsum(frames) - frames,
        episode_frames=frames,
        offsets=offsets,
        sizes=sizes,
        checksums=checksums.astype(np.uint32),
        shards=np.array(list(shards), np.int64),
        shard_bytes=np.array([filesystem.size(shard) for shard in shards.values()], np.int64),
    )


def _scan_shard(
    filesystem: fsspec.AbstractFileSystem, shard: str, extensions: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name of each episode of a shard and int64[F, M, 3]: offset, size and CRC-32 of its members."""
    columns = {extension: column for column, extension in enumerate(extensions)}
    episodes: dict[str, dict[int, list[tuple[int, int, int]]]] = {}
    for name, *place in _members(filesystem, shard):
        match = MEMBER.fullmatch(name)
        if not match:
            raise OwlError(
                "shard.member",
                f"{shard} holds {name}, expected <episode>/<frame>.<extension>; pack it again without that, or "
                "remove the shard",
            )
        members = episodes.setdefault(match["episode"], {}).setdefault(int(match["frame"]), [ABSENT] * len(columns))
        if match["extension"] in columns:
            members[columns[match["extension"]]] = (place[0], place[1], place[2])
    in_order = True
    for episode, frames in episodes.items():
        for expected, frame in enumerate(sorted(frames)):
            if frame != expected:
                raise OwlError(
                    "shard.order",
                    f"{shard} holds frame {frame} of episode {episode}, expected frame {expected}; make the "
                    "dataset again",
                )
        table = np.array([frames[frame] for frame in range(len(frames))], np.int64).reshape(-1, len(columns), 3)
        begin = np.where(table[..., 0] < 0, np.iinfo(np.int64).max, table[..., 0]).min(axis=1)
        in_order = in_order and bool((np.diff(begin) >= 0).all())
        yield episode, table
    if not in_order:
        warnings.warn(
            f"{shard} does not store its frames in temporal order, which makes reading slower; pack it again with "
            "`tar --sort=name`",
            stacklevel=4,
        )


def _members(filesystem: fsspec.AbstractFileSystem, shard: str) -> Iterator[tuple[str, int, int, int]]:
    """Yield (name, offset, size, CRC-32) of a tar's files; of a damaged tar only those of complete frames.

    Headers of PAX and GNU tar are supported. Folders are skipped, and so are files whose name starts with a dot, which
    macOS adds (.DS_Store, ._*).
    """
    frame: list[tuple[str, int, int, int]] = []
    with filesystem.open(shard, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="strict") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # frees the memory of previous members
                    name = PurePosixPath(member.name).as_posix()  # without the ./ of `tar c .`
                    if member.isdir() or name.rpartition("/")[2].startswith("."):
                        continue
                    if not member.isreg() or member.issparse():
                        raise OwlError(
                            "shard.member",
                            f"{shard} holds {name} as a link or with holes, expected plain files; pack it again "
                            "with `tar --hard-dereference --dereference` and without --sparse",
                        )
                    file.seek(member.offset_data)
                    content = file.read(member.size)
                    if len(content) < member.size:
                        raise EOFError(f"{name} is cut short")
                    if frame and _frame_name(frame[0][0]) != _frame_name(name):
                        yield from frame
                        frame.clear()
                    frame.append((name, member.offset_data, member.size, zlib.crc32(content)))
                    file.seek(tar.offset)
                file.seek(tar.offset)
                if file.read(BLOCK) != bytes(BLOCK):  # TarFile treats an unreadable header as the end
                    raise EOFError("it does not end as a tar does")
        except (tarfile.TarError, UnicodeDecodeError, EOFError) as error:
            # the last frame may lack members from the lost part
            lost = _frame_name(frame[0][0]) if frame else "its first frame"
            warnings.warn(f"{shard} is damaged ({error}): frames from {lost} on are left out", stacklevel=4)
            return
    yield from frame


def _frame_name(member: str) -> str:
    """Return ``<episode>/<frame>`` of a member's name; the episode may contain dots."""
    episode, _, rest = member.rpartition("/")
    return f"{episode}/{rest.partition('.')[0]}"
