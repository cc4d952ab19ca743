"""Source datasets, from which other datasets are derived frame by frame."""

import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from owl.data.modalities import MODALITIES
from owl.data.modalities.base import Modality, Sampling
from owl.data.reader import ShardReader, damage, read_members
from owl.data.shards import DatasetInfo, ShardIndex
from owl.errors import OwlError
from owl.version import code_version


@dataclass(frozen=True)
class Source:
    """A source dataset and the modalities used from it.

    Attributes:
        url: Its folder, any fsspec URL.
        info: Its description.
        index: Its index.
        taken: Modalities to decode.
        kept: Modalities whose members are copied, in order.
        size: (h, w) of decoded pictures; None keeps the stored size.
    """

    url: str
    info: DatasetInfo
    index: ShardIndex
    taken: tuple[str, ...]
    kept: tuple[str, ...]
    size: tuple[int, int] | None = None

    @classmethod
    def open(cls, url: str, taken: Iterable[str], kept: Iterable[str] | None = None) -> "Source":
        """Open a dataset; without ``kept``, controls are copied if there are any.

        Raises:
            OwlError: The dataset is unfinished, or lacks one of the modalities, or OWL has no modality of that name.
        """
        taken = tuple(taken)
        if unknown := [name for name in taken if name not in MODALITIES]:
            raise OwlError(
                "dataset.modalities",
                f"the network declares the modality '{unknown[0]}', expected one of {', '.join(MODALITIES)}; correct "
                "the attribute modalities of its class",
            )
        info, index = DatasetInfo.load(url), ShardIndex.load(url)
        kept = [name for name in ("controls",) if name in info.modalities] if kept is None else list(kept)
        for name in (*taken, *kept):
            if name not in info.modalities:
                raise OwlError(
                    "dataset.modalities",
                    f"{url} has no {name} to encode or to keep, it holds {', '.join(info.modalities)}; choose "
                    "from these",
                )
        return cls(str(url), info, index, taken, tuple(name for name in info.modalities if name in kept))

    def modality(self, name: str, length: int, stride: int = 1) -> Modality:
        """Return a modality for decoding windows of ``length`` frames."""
        sampling = Sampling(self.url, self.info.fps, self.info.size, length, stride, resize=self.size)
        return MODALITIES[name](name, self.info.modalities[name], sampling)

    def derive(self, kind: str, modalities: dict[str, dict], **source: Any) -> DatasetInfo:
        """Return the description of a derived dataset with other modalities and the same episodes."""
        origin = {"kind": kind, "path": self.url, "identity": self.info.identity(self.index), **source}
        return replace(self.info, modalities=modalities, source=origin, code_version=code_version())


class SampleReader:
    """Reader of spans of frames, each with one contiguous read.

    Args:
        source: The dataset.
        pin: Whether to copy samples into pinned memory.
    """

    def __init__(self, source: Source, pin: bool = False) -> None:
        self._source, self._pin = source, pin
        self._reader = ShardReader(source.url, None, "")
        self._extension = {name: source.info.modalities[name]["extension"] for name in (*source.taken, *source.kept)}

    def read(self, episode: int, first: int, stop: int) -> tuple[dict[str, Tensor], list[dict[str, bytes]], str | None]:
        """Read frames [first, stop) of an episode, up to the first frame with a damaged or missing member.

        Returns:
            The tensors of the decoded modalities, as in a window of these frames; the members to copy of each frame by
            extension, without absent ones; and the problem of the next frame, None if all frames were read.
        """
        index, wanted = self._source.index, list(dict.fromkeys(self._extension.values()))
        members, wrong = read_members(self._reader, index, episode, range(first, stop), wanted)
        sample: dict[str, Tensor] = {}
        while members:
            sample, good, reason = self._sample(members)
            if reason is None:
                break
            members, wrong = members[:good], damage(index, episode, first + good, reason)
        keep = [self._extension[name] for name in self._source.kept]
        return sample, [{kept: found[kept] for kept in keep if kept in found} for found in members], wrong

    def _sample(self, members: list[dict[str, bytes]]) -> tuple[dict[str, Tensor], int, ValueError | None]:
        """Decode frames; also return the number of valid frames, and the error of the next one."""
        good = 0

        def decoded(modality: Modality) -> Iterator[np.ndarray]:
            nonlocal good
            extension = self._extension[modality.name]
            for good, found in enumerate(members):  # noqa: B007
                if extension not in found:
                    raise ValueError(f"it has no {extension}")
                yield modality.decode(found[extension])
            good = 0  # if all decode but are inconsistent, none are valid

        sample: dict[str, Tensor] = {}
        try:
            for name in self._source.taken:
                modality = self._source.modality(name, len(members))
                tensors = {
                    key: torch.empty(shape, dtype=dtype, pin_memory=self._pin)
                    for key, (shape, dtype) in modality.shapes().items()
                }
                arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
                modality.assemble(decoded(modality), modality.sampling.draw(None, 1), arrays)
                sample |= tensors
        except ValueError as error:
            return {}, good, error
        return sample, len(members), None

    def stretches(self, episode: int, length: int) -> Iterator[tuple[dict[str, Tensor], list[dict[str, bytes]]]]:
        """Yield an episode in spans of ``length`` frames, the last one shorter, as returned by `read`.

        The next span is prefetched in a thread. At a damaged member the episode ends, with a warning.
        """
        frames = int(self._source.index.episode_frames[episode])
        with ThreadPoolExecutor(1) as ahead:
            following = ahead.submit(self.read, episode, 0, min(length, frames))
            for stop in range(length, frames + length, length):
                sample, kept, wrong = following.result()
                if stop < frames and wrong is None:
                    following = ahead.submit(self.read, episode, stop, min(stop + length, frames))
                if kept:
                    yield sample, kept
                if wrong is not None:
                    warnings.warn(f"{self._source.url}: {wrong}; the episode ends before it", stacklevel=3)
                    return
