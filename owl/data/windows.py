"""Windows of consecutive frames as training samples: one contiguous read each, decoding only selected modalities."""

import math
import warnings
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from owl.data.modalities import MODALITIES
from owl.data.modalities.base import Modality, Sampling, View
from owl.data.reader import ShardReader
from owl.data.shards import DatasetInfo, ShardIndex, shard_name
from owl.errors import OwlError

MAX_REPLACEMENTS = 256
PADDING = -1  # the document of the frames after the last clip of a pack
OPEN_PACKS = (
    64  # packs that a clip may still join: more waste less room, fewer keep the clips of a pack near in storage
)


class CorruptSampleWarning(UserWarning):
    """A sample could not be decoded and was replaced by another window."""


class SkippedEpisodeWarning(UserWarning):
    """An episode of the split is not used."""


class _CorruptMember(Exception):
    """A member of the window cannot be decoded; the warning was already issued."""


@dataclass(frozen=True)
class _Clip:
    """Consecutive frames of one episode: a window, or a part of a pack.

    Attributes:
        episode: Position of the episode in the index.
        first: First frame.
        length: Number of delivered frames, ``stride`` stored frames apart.
    """

    episode: int
    first: int
    length: int


class WindowDataset(Dataset):
    """All windows of one split. A window is ``length`` frames, ``stride`` stored frames apart; windows start every
    ``hop`` frames, and the last window of an episode ends with the episode.

    Args:
        path: The dataset's folder, any fsspec URL.
        split: "train", "validation" or "test".
        modalities: Modalities to decode, from those in `owl.data.modalities.MODALITIES` that the dataset has.
        length: Frames in a window (T).
        stride: Stored frames from one frame of a window to the next.
        hop: Stored frames from the start of one window to the start of the next.
        size: (h, w) of the delivered pictures; None keeps the stored size. Smaller JPEGs are decoded at reduced scale.
        cache_dir: Local folder for complete copies of remote shards.
        flip: Probability of mirroring a window left to right: pictures, flow dx, stereo channels and controls; must be
            0 with latents, which cannot be mirrored.
        crop: (h, w) of a crop of the delivered pictures, the same for all frames and modalities; None disables
            cropping; must be None with latents.
        pack: Whether several episodes shorter than a window share a window instead of being skipped; samples then
            contain the document index of each frame ("document"). For models that mask attention between documents;
            audio cannot be packed.
        info: The content of its dataset.json, if that has been read already.

    Raises:
        OwlError: The dataset is missing, unfinished or of another version, lacks a modality, the split is empty, or
            every episode is shorter than a window and ``pack`` is not set, or ``pack`` is set with audio.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        modalities: Sequence[str] = ("rgb",),
        length: int = 1,
        stride: int = 1,
        hop: int = 1,
        size: Sequence[int] | None = None,
        cache_dir: str | Path | None = None,
        flip: float = 0.0,
        crop: Sequence[int] | None = None,
        pack: bool = False,
        info: DatasetInfo | None = None,
    ) -> None:
        if min(length, stride, hop) < 1:
            raise OwlError(
                "arguments.too-small",
                f"length {length}, stride {stride}, hop {hop}: each must be at least 1; change the smallest",
            )
        self.path, self.split, self.modalities = str(path), split, tuple(modalities)
        self.length, self.stride, self.pack = length, stride, pack
        self.info = info or DatasetInfo.load(path)
        index = ShardIndex.load(path, cache_dir)
        self.identity = self.info.identity(index)
        self._index = index
        self._columns = self._find_columns()
        self._sampling = Sampling(
            url=self.path,
            fps=self.info.fps,
            stored=self.info.size,
            length=length,
            stride=stride,
            resize=None if size is None else (int(size[0]), int(size[1])),
            crop=None if crop is None else (int(crop[0]), int(crop[1])),
            flip=flip,
            pack=pack,
        )
        self._decoders: dict[str, Modality] = {
            name: MODALITIES[name](name, self.info.modalities[name], self._sampling) for name in self.modalities
        }
        self._grid = math.lcm(*(decoder.grid for decoder in self._decoders.values()))
        self._sampling.check_crop(self._grid)
        self._reader = ShardReader(path, cache_dir, self.identity)
        self._span = self._sampling.span
        self._hop = hop
        episodes = self._find_episodes()
        long = index.episode_frames[episodes] >= self._span
        packs = self._make_packs(episodes[~long])
        # a pack takes the position of its first episode, as an episode with a single window
        firsts = np.array([*episodes[long], *(pack[0].episode for pack in packs)], np.int64)
        order = np.argsort(firsts, kind="stable")
        self._episodes, ordinary = firsts[order], int(long.sum())
        self._packs = {n: packs[i - ordinary] for n, i in enumerate(order.tolist()) if i >= ordinary}
        extra = np.maximum(index.episode_frames[self._episodes] - self._span, 0)
        self._ends = np.cumsum(-(-extra // hop) + 1)  # window indices of episode e end before _ends[e]
        self._reported: set[str] = set()
        self._step = _coprime_step(len(self))

    def _find_columns(self) -> dict[str, int]:
        stored = list(self.info.modalities)
        for modality in self.modalities:
            if modality not in stored or modality not in MODALITIES:
                known = ", ".join(m for m in stored if m in MODALITIES)
                raise OwlError(
                    "windows.modalities",
                    f"{self.path} has no modality {modality!r}, it holds {known}; choose from these",
                )
        if not self.modalities:
            raise OwlError(
                "windows.modalities", f"no modality of {self.path} is requested; choose from {', '.join(stored)}"
            )
        extensions = list(self._index.extensions)
        return {m: extensions.index(self.info.modalities[m]["extension"]) for m in self.modalities}

    def _find_episodes(self) -> np.ndarray:
        """Return the positions in the index of the split's usable episodes, in the order of their rows."""
        index, columns = self._index, list(self._columns.values())
        if self.split not in self.info.splits:
            raise OwlError(
                "windows.split",
                f"{self.path} has no split {self.split!r}, it has {', '.join(self.info.splits)}; name one",
            )
        names = self.info.splits[self.split]
        if not names:
            counts = ", ".join(f"{split} {len(episodes)}" for split, episodes in self.info.splits.items())
            raise OwlError(
                "dataset.empty-split",
                f"split {self.split!r} of {self.path} is empty (episodes: {counts}), expected at least one; "
                "record or import more episodes, or use another split",
            )
        positions = {str(name): position for position, name in enumerate(index.episodes)}
        kept, short = [], []
        for name in names:
            position = positions.get(name)
            if position is None:
                self._skip(name, "it is in no shard")
                continue
            row, frames = int(index.episode_row[position]), int(index.episode_frames[position])
            present = (index.sizes[row : row + frames, columns] >= 0).sum(axis=0)  # an episode at a time: less memory
            if (present != frames).any():
                found = ", ".join(f"{m} {n}" for m, n in zip(self._columns, present, strict=True))
                self._skip(name, f"its modalities have different numbers of frames ({found} of {frames})")
            elif frames < self._span and not self.pack:
                short.append(frames)
            else:
                kept.append(position)
        if not kept and short:
            raise OwlError(
                "windows.too-short",
                f"every usable episode of split {self.split!r} of {self.path} is shorter than the {self._span} frames "
                f"of a window (the longest has {max(short)}); use a smaller length or stride, or set pack to true",
            )
        if not kept:
            raise OwlError(
                "windows.incomplete",
                f"no episode of split {self.split!r} of {self.path} is complete for {', '.join(self.modalities)}; "
                "request other modalities or make the dataset again",
            )
        if short:
            self._skip(f"{len(short)} short ones", f"a window is {self._span} frames, the longest has {max(short)}")
        return np.sort(np.array(kept, np.int64))

    def _make_packs(self, short: np.ndarray) -> list[list[_Clip]]:
        """Pack short episodes into windows: each clip goes into the first open window with enough free frames.

        If a stride skips frames, an episode gives one clip for each first frame at which windows start.
        """
        packs: list[list[_Clip]] = []
        room: deque[list[int]] = deque(maxlen=OPEN_PACKS)  # of the last packs: [number, frames that are free]
        for episode in short.tolist():
            frames = int(self._index.episode_frames[episode])
            for first in range(0, min(self.stride, frames), self._hop):
                clip = _Clip(episode, first, -(-(frames - first) // self.stride))
                place = next((p for p in room if p[1] >= clip.length), None)
                if place is None:
                    place = [len(packs), self.length]
                    packs.append([])
                    room.append(place)
                packs[place[0]].append(clip)
                place[1] -= clip.length
        return packs

    def _skip(self, episode: str, reason: str) -> None:
        warnings.warn(f"{self.path}: episode {episode} is skipped: {reason}", SkippedEpisodeWarning, stacklevel=4)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def shard_windows(self) -> list[range]:
        """Return the window indices of each shard, for shuffling within blocks of shards."""
        shards = self._index.episode_shard[self._episodes]
        last = np.flatnonzero(np.diff(shards, append=-1))  # the last episode of each shard
        stops = [0, *self._ends[last].tolist()]
        return [range(start, stop) for start, stop in pairwise(stops)]

    def describe(self, window: int) -> dict[str, Any]:
        """Return the source of a window: its episode, its shard and its [first, last] frame.

        For a pack these describe the first clip; "packed_with" lists the same for the others.
        """
        first, *others = [
            {
                "episode": str(self._index.episodes[clip.episode]),
                "shard": shard_name(int(self._index.episode_shard[clip.episode])),
                "frames": [clip.first, clip.first + (clip.length - 1) * self.stride],
            }
            for clip in self._clips(window)
        ]
        return {**first, "packed_with": others} if others else first

    def _clips(self, window: int) -> list[_Clip]:
        """Return the clips of a window: one, or those of a pack."""
        number = int(np.searchsorted(self._ends, window, side="right"))
        if number in self._packs:
            return self._packs[number]
        episode = int(self._episodes[number])
        before = int(self._ends[number - 1]) if number else 0
        first = min((window - before) * self._hop, int(self._index.episode_frames[episode]) - self._span)
        return [_Clip(episode, first, self.length)]

    def shapes(self, modalities: Sequence[str] | None = None) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape and dtype of each tensor of a sample, or only of some modalities."""
        document = {"document": ((self.length,), torch.int64)} if self.pack else {}
        decoders = [self._decoders[name] for name in modalities or self.modalities]
        shapes = {name: shape for decoder in decoders for name, shape in decoder.shapes().items()}
        return {**shapes, **document}

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return one window.

        Args:
            item: Window index, or (index, augmentation seed). Without a seed: central crop, no mirroring.

        Returns:
            "window": int64, the index of the delivered window (a different one if the requested window is corrupt);
            the tensors of the selected modalities, as documented by their classes in ``owl/data/modalities``;
            "document", with ``pack``: int64[T], the index of the clip of each frame, 0, 1, ..., and -1 for padding,
            where everything else is 0. Damaged clips of a pack are omitted.

        Raises:
            IndexError: The window index is out of range.
            OwlError: No window could be decoded, or the storage fails.
        """
        return {name: tensor[0] for name, tensor in self.batch([item]).items()}

    def batch(
        self, items: Sequence[int | tuple[int, int]], modalities: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return several windows, stacked: [B, ...]; of all modalities, or only of some."""
        batch = self.empty(len(items), modalities)
        return {"window": torch.tensor(self.fill(items, batch)), **batch}

    def empty(self, samples: int, modalities: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Allocate the tensors of a batch."""
        shapes = self.shapes(modalities)
        return {name: torch.empty((samples, *shape), dtype=dtype) for name, (shape, dtype) in shapes.items()}

    def fill(self, items: Sequence[int | tuple[int, int]], batch: dict[str, torch.Tensor]) -> list[int]:
        """Load several windows into the tensors of a batch (`empty`); a modality without tensors in it is not read.

        Pictures are decoded in place, which avoids the copies of collation, a seventh of the time.

        Returns:
            The indices of the delivered windows.
        """
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}
        return [self._fill(item, {name: a[n] for name, a in arrays.items()}) for n, item in enumerate(items)]

    def _fill(self, item: int | tuple[int, int], into: dict[str, np.ndarray]) -> int:
        """Write a sample into arrays and return the index of its window."""
        window, seed = item if isinstance(item, tuple) else (item, None)
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} of {len(self)}")
        for attempt in range(min(len(self), MAX_REPLACEMENTS)):
            candidate = (window + attempt * self._step) % len(self)
            try:
                self._load(candidate, seed, into)
                return candidate
            except _CorruptMember:
                continue  # the choice of the replacement depends only on the window, so it is the same in every worker
        raise OwlError(
            "windows.damaged",
            f"{attempt + 1} consecutive windows of {self.path} could not be decoded; find the damage with "
            f"`python -m owl data verify {self.path}` and make the dataset again",
        )

    def _load(self, window: int, seed: int | None, into: dict[str, np.ndarray]) -> None:
        view, clips = self._sampling.draw(seed, self._grid), self._clips(window)
        if not self.pack:
            self._load_clip(clips[0], view, into)
            return
        filled = document = 0
        for clip in clips:
            try:
                self._load_clip(clip, view, {name: a[filled : filled + clip.length] for name, a in into.items()})
            except _CorruptMember:
                continue
            into["document"][filled : filled + clip.length] = document
            filled, document = filled + clip.length, document + 1
        if not filled:
            raise _CorruptMember
        for name, array in into.items():
            array[filled:] = PADDING if name == "document" else 0

    def _load_clip(self, clip: _Clip, view: View, into: dict[str, np.ndarray]) -> None:
        episode, row = clip.episode, int(self._index.episode_row[clip.episode])
        last = clip.first + (clip.length - 1) * self.stride
        decoders = {name: each for name, each in self._decoders.items() if each.shapes().keys() <= into.keys()}
        frames = {name: decoder.frames(clip.first, last) for name, decoder in decoders.items()}
        # one contiguous range, including members of other modalities
        read = slice(row + min(needed.start for needed in frames.values()), row + last + 1)
        columns = [self._columns[name] for name in decoders]
        offsets, sizes = self._index.offsets[read, columns], self._index.sizes[read, columns]
        start, stop = int(offsets.min()), int((offsets + sizes).max())
        data = memoryview(self._reader.read(int(self._index.episode_shard[episode]), start, stop))
        for name, decoder in decoders.items():
            members = (self._decode(name, episode, data, start, row + frame) for frame in frames[name])
            try:
                decoder.assemble(members, view, into, clip.first - frames[name].start)
            except ValueError as error:
                self._report(name, episode, row + clip.first, error)
                raise _CorruptMember from error

    def _decode(self, modality: str, episode: int, data: memoryview, start: int, row: int) -> np.ndarray:
        """Decode one member of the window's bytes, or warn and raise _CorruptMember."""
        column = self._columns[modality]
        offset, size = int(self._index.offsets[row, column]) - start, int(self._index.sizes[row, column])
        content = data[offset : offset + size]
        try:
            if len(content) < size:
                raise ValueError("the shard is cut short")
            # JPEG has no checksum: most flipped bits decode to a wrong picture without an error
            if zlib.crc32(content) != self._index.checksums[row, column]:
                raise ValueError("its checksum is wrong")
            return self._decoders[modality].decode(content)
        except ValueError as error:
            self._report(modality, episode, row, error)
            raise _CorruptMember from error

    def _report(self, modality: str, episode: int, row: int, error: ValueError) -> None:
        """Warn once (in this process) that a member is corrupt."""
        frame = row - int(self._index.episode_row[episode])
        name = str(self._index.episodes[episode])
        member = f"{name}/{frame:06d}.{self._index.extensions[self._columns[modality]]}"
        if member not in self._reported:
            self._reported.add(member)
            consequence = "packs leave its clip out, and other windows" if self.pack else "other windows"
            warnings.warn(
                f"{self.path}: episode {name}, frame {frame}: member {member} is corrupt ({error}); "
                f"{consequence} replace those that contain it",
                CorruptSampleWarning,
                stacklevel=5,
            )


def _coprime_step(count: int) -> int:
    """Return a step near the golden section, coprime to ``count``: it visits all windows, distant ones first."""
    step = max(1, round(count * 0.618))
    while math.gcd(step, count) > 1:
        step += 1
    return step
