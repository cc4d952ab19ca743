"""Verification of all members of a dataset, and repair of its index."""

import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import PurePosixPath

import fsspec
import numpy as np

from owl.data.modalities.audio import Audio, AudioLevels
from owl.data.overview import DatasetReader
from owl.data.scan import scan_shards
from owl.data.shards import BLOCK, INDEX_NAME, DatasetInfo, ShardIndex, list_shards, shard_name
from owl.data.storage import open_filesystem
from owl.errors import OwlError

PROBES = 9
"""Number of members of a shard to check."""
LONGEST_NAME = 99
"""Characters of a name that every kind of tar keeps in the member's own header."""


def index_is_current(url: str) -> bool:
    """Return whether a dataset has a readable index that matches the shards of the folder and their members.

    A shard that was repacked in another order may have the same size, so the names of some members are checked.
    """
    try:
        index = ShardIndex.load(url)
    except OwlError:
        return False
    filesystem, path = open_filesystem(url)
    shards = list_shards(filesystem, path)
    found = {number: filesystem.size(shard) for number, shard in shards.items()}
    if found != dict(zip(index.shards.tolist(), index.shard_bytes.tolist(), strict=True)):
        return False
    return all(_holds(filesystem, shard, index, number) for number, shard in shards.items())


def _holds(filesystem: fsspec.AbstractFileSystem, shard: str, index: ShardIndex, number: int) -> bool:
    """Return whether most of a few members of a shard match the index; one with a damaged header may not."""
    fitting = looked_up = 0
    episodes = np.flatnonzero(index.episode_shard == number)
    ends = np.cumsum(index.episode_frames[episodes])
    for position in np.unique(np.linspace(0, int(ends[-1]) - 1, PROBES).astype(int)) if len(ends) else ():
        place = int(np.searchsorted(ends, position, side="right"))
        frame = int(position) - (int(ends[place - 1]) if place else 0)
        offsets = index.offsets[int(index.episode_row[episodes[place]]) + frame]
        column = int(offsets.argmax())  # a member that is there
        name = f"{index.episodes[episodes[place]]}/{frame:06d}.{index.extensions[column]}"
        if offsets[column] < BLOCK or len(name) > LONGEST_NAME:
            continue
        looked_up += 1
        with suppress(tarfile.HeaderError, UnicodeDecodeError):
            header = filesystem.cat_file(shard, start=int(offsets[column]) - BLOCK, end=int(offsets[column]))
            found = tarfile.TarInfo.frombuf(header, "utf-8", "strict").name
            fitting += PurePosixPath(found).as_posix() == name
    return 2 * fitting >= looked_up


def repair_index(url: str) -> bool:
    """Rebuild the index from the tars if it is missing, damaged, of another version, or lists other shards.

    An index that matches its shards is kept: rebuilding it would accept the checksums of damaged members.

    Returns:
        Whether the index was rebuilt.

    Raises:
        OwlError: ``dataset.json`` is missing, the tars are not of this format, or the dataset never had an index since
            whatever makes it was interrupted.
    """
    info = DatasetInfo.load(url)
    if index_is_current(url):
        return False
    index = scan_shards(url)
    filesystem, path = open_filesystem(url)
    if (lost := _lost(info, index)) and not filesystem.exists(f"{path}/{INDEX_NAME}"):
        raise OwlError(
            "dataset.unfinished",
            f"{url} is unfinished: {len(lost)} of its episodes, such as {lost[0][1]}, are in no shard; run the command "
            "that made it again, which continues where it stopped",
        )
    index.save(url)
    return True


def verify_members(reader: DatasetReader, levels: AudioLevels | None = None) -> Iterator[list[str]]:
    """Decode every member, one episode after another; of modalities that OWL does not know, check the bytes alone.

    Args:
        reader: The dataset.
        levels: Accumulates the levels of its sound.

    Yields:
        For each episode of the index what is wrong with it, one sentence per member; an empty list where all is well.

    Raises:
        OwlError: A shard is missing.
    """
    index = reader.index
    for episode, name in enumerate(index.episodes):
        problems = []
        for frame in range(int(index.episode_frames[episode])):
            row = int(index.episode_row[episode]) + frame
            for modality, column in reader.columns.items():
                try:
                    content = reader.content(modality, episode, frame)
                    if zlib.crc32(content) != index.checksums[row, column]:
                        raise ValueError("its checksum is wrong")
                    if modality in reader.decoders:
                        array = reader.decoders[modality].decode(content)
                        if levels is not None and isinstance(reader.decoders[modality], Audio):
                            levels.add(array)
                except ValueError as error:
                    shard = shard_name(int(index.episode_shard[episode]))
                    member = f"{name}/{frame:06d}.{index.extensions[column]}"
                    problems.append(f"{reader.url}/{shard}: {member}: {error}")
        yield problems


def missing_episodes(reader: DatasetReader) -> list[str]:
    """Return one message for each episode of a split that is not in any shard."""
    return [
        f"{reader.url}: episode {name} of split {split} is in no shard"
        for split, name in _lost(reader.info, reader.index)
    ]


def _lost(info: DatasetInfo, index: ShardIndex) -> list[tuple[str, str]]:
    """Return split and name of each episode of a split that is not in any shard."""
    present = {str(name) for name in index.episodes}
    return [(split, name) for split, names in info.splits.items() for name in names if name not in present]
