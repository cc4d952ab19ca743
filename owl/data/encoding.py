"""Latent datasets: modalities of a dataset, encoded once by trained networks."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from owl.data import codecs
from owl.data.encoder import FrameEncoder
from owl.data.jobs import Frames, Made, ShardJob, local_folder, run
from owl.data.modalities import MODALITIES
from owl.data.pictured import PICTURED, Pictured
from owl.data.reader import ShardReader, read_members
from owl.data.shards import DatasetInfo, ShardIndex
from owl.data.source import SampleReader, Source
from owl.errors import OwlError, at_least
from owl.hardware import default_device


def encode_dataset(
    encoders: Sequence[FrameEncoder],
    source: str,
    directory: str | Path,
    *,
    names: Sequence[str] | None = None,
    keep: Sequence[str] | None = None,
    sample: bool = False,
    batch_size: int = 64,
    motion_stride: int = 1,
    depth_delay: float = 0.0,
    workers: int = 0,
) -> DatasetInfo:
    """Write a dataset of latents, or finish one that was interrupted (`owl.data.jobs.run`).

    An episode with a damaged member is truncated before it, with a warning. An encoder of pictures whose latents are
    named "motion_latent" or "depth_latent" encodes the picture of the flow or of the depth (`owl.data.pictured`).

    Args:
        encoders: The networks, one for each modality of latents; they are moved to the GPU if there is one.
        source: The dataset to encode, any fsspec URL.
        directory: Local folder for the new dataset.
        names: Name of the latents of each encoder (`FrameEncoder.find_name`); None: the default ones.
        keep: Modalities of the source to copy byte for byte; None keeps controls if there are any.
        sample: Whether to store a sample of each posterior rather than its mean.
        batch_size: Frames per batch; sound is encoded one episode at a time.
        motion_stride: Frames over which the pictures of flow lead back, the stride of the world model.
        depth_delay: Seconds by which the pictures of depth are earlier, warped by the pose of the camera.
        workers: Number of worker processes, each with a copy of the networks; 0 encodes in this process.

    Returns:
        The description of the finished dataset.

    Raises:
        OwlError: As `run`; or the source lacks a modality of a network (`Source.open`, `FrameEncoder.layout`) or has
            no training split, two latents have the same name, or a network returns NaN or latents with a shape other
            than declared.
    """
    root = local_folder(directory)
    at_least(1, batch_size=batch_size, motion_stride=motion_stride)
    at_least(0, depth_delay=depth_delay)
    taken = [
        taken_by(encoder, name, depth_delay)
        for encoder, name in zip(encoders, names or [""] * len(encoders), strict=False)
    ]
    original = Source.open(source, chain.from_iterable(taken), keep)
    names = find_names(encoders, names)
    for name in names:
        if name in original.kept:
            raise OwlError(
                "dataset.modalities",
                f"the {name} of {source} has the name of the new latents; do not keep it, or choose another --name",
            )
    if not original.info.splits.get("train"):
        raise OwlError(
            "dataset.empty-split",
            f"the train split of {source} is empty, the latents' mean and standard deviation are those of its frames; "
            "record or import more episodes",
        )
    latents = []
    for name, encoder, modalities in zip(names, encoders, taken, strict=True):
        pictures = None
        if pictured(encoder, name):
            pictures = Pictured.of(name, encoder.size, original, motion_stride, depth_delay)
        latents.append(_Latents(name, encoder, replace(original, taken=modalities, kept=()), pictures))
    # members lie in the order of the description, in which those that are copied are the last
    latents[-1] = replace(latents[-1], original=replace(latents[-1].original, kept=original.kept))
    return run(_EncodeJob(latents, original, sample, batch_size), root, workers)


def pictured(encoder: FrameEncoder, name: str) -> str | None:
    """Return the modality that latents of a name encode as pictures; None if the encoder takes what it declares."""
    return PICTURED.get(name) if list(encoder.network.modalities) == ["rgb"] else None


def taken_by(encoder: FrameEncoder, name: str, depth_delay: float) -> tuple[str, ...]:
    """Return the modalities of the source that latents of a name are made of."""
    modality = pictured(encoder, name)
    if modality is None:
        return tuple(encoder.network.modalities)
    return (modality, "pose") if modality == "depth" and depth_delay else (modality,)


def find_names(encoders: Sequence[FrameEncoder], names: Sequence[str] | None = None) -> list[str]:
    """Return the name of the latents of each encoder.

    Args:
        encoders: The encoders.
        names: Their names; None: the default ones.

    Raises:
        OwlError: There are more or fewer names than encoders, two are the same, or one does not fit its encoder.
    """
    if names is not None and len(names) != len(encoders):
        raise OwlError(
            "arguments.wrong-value",
            f"{', '.join(names)} are {len(names)} names, expected one for each of {len(encoders)} encoders; correct "
            "--name",
        )
    wanted: Sequence[str | None] = [None] * len(encoders) if names is None else names
    found = [encoder.find_name(name) for encoder, name in zip(encoders, wanted, strict=True)]
    for name in found:
        if found.count(name) > 1:
            both = " and ".join(encoder.checkpoint for encoder, n in zip(encoders, found, strict=True) if n == name)
            raise OwlError(
                "arguments.wrong-value",
                f"the latents of {both} are all named {name}, expected different names; set --name to one for each",
            )
    return found


@dataclass(frozen=True)
class _Latents:
    """The latents of one encoder.

    Attributes:
        name: Their name.
        encoder: The encoder.
        original: The source dataset, with the modalities that the encoder takes, and those that are copied along.
        pictures: The pictures that the encoder takes instead of the frames; None: the modalities themselves.
    """

    name: str
    encoder: FrameEncoder
    original: Source
    pictures: Pictured | None

    @property
    def extension(self) -> str:
        return MODALITIES[self.name].extension

    def description(self, sample: bool) -> dict[str, Any]:
        """Return their entry in dataset.json, without statistics."""
        return {
            "extension": self.extension,
            **self._layout,
            **({} if self.pictures is None else self.pictures.scale()),
            "posterior": "sample" if sample else "mean",
            "encoder": self.encoder.identity,
        }

    @cached_property
    def _layout(self) -> dict[str, Any]:
        if self.pictures is None:
            return self.encoder.layout(self.original)
        return {"encoding": "npy float16[c, h, w]", "shape": self.encoder.latent_shape}

    def members(self, episode: int, sample: bool, batch_size: int) -> Iterator[dict[str, bytes]]:
        """Yield the latent of each frame of an episode, up to a damaged one, and the members to copy."""
        device = default_device()
        self.encoder.network.to(device=device, memory_format=torch.channels_last)
        reader = SampleReader(self.original, pin=device.type == "cuda")
        name = str(self.original.index.episodes[episode])
        # the noise depends only on the episode, not on where an interrupted run continues
        noise = torch.Generator(device).manual_seed(zlib.crc32(name.encode())) if sample else None
        together = int(self.original.index.episode_frames[episode]) if self.encoder.is_of_sound else batch_size
        stretches = reader.stretches(episode, together)
        for tensors, kept in stretches if self.pictures is None else self.pictures.stretches(stretches):
            latents = self._divide(self.encoder.encode(tensors, noise), len(kept))
            for latent, copied in zip(latents, kept, strict=True):
                if not np.isfinite(latent).all():
                    raise OwlError(
                        "latents.non-finite",
                        f"the encoder of {self.encoder.checkpoint} gives latents of episode {name} that are not "
                        "finite in float16; use a checkpoint of a run that did not diverge",
                    )
                yield {self.extension: codecs.encode_array(latent), **copied}

    def _divide(self, latents: np.ndarray, frames: int) -> list[np.ndarray]:
        """Return the latents of each frame; for sound the tokens that end within the frame."""
        shape, cuts = self._layout["shape"], list(range(frames + 1))
        if self.encoder.is_of_sound:
            shape, clock = shape[-1:], self.encoder.clock(self.original.info.fps)
            cuts = [clock.least(frame) for frame in cuts]
        if list(latents.shape[1:]) != shape or len(latents) < cuts[-1]:
            raise OwlError(
                "latents.shape",
                f"the encoder of {self.encoder.checkpoint} gives {list(latents.shape)} for {frames} frames, "
                f"expected {[cuts[-1], *shape]} as it declares; correct its class",
            )
        return [latents[a:b] if self.encoder.is_of_sound else latents[a] for a, b in pairwise(cuts)]


class _EncodeJob(ShardJob):
    """Latents of a dataset, divided into the same shards."""

    doing, kinds = "encoding", ("encoded",)

    def __init__(self, latents: list[_Latents], original: Source, sample: bool, batch_size: int) -> None:
        self._latents, self._original, self._sample, self._batch_size = latents, original, sample, batch_size
        self.shards = original.index.frames_of_shards()
        described = {each.name: each.description(sample) for each in latents}
        kept = {name: original.info.modalities[name] for name in original.kept}
        checkpoints = ", ".join(each.encoder.checkpoint for each in latents)
        self.info = original.derive("encoded", described | kept, checkpoint=checkpoints)

    def settings(self, info: DatasetInfo) -> dict[str, Any]:
        settings = {
            "modalities": ", ".join(info.modalities),
            "source": Made(info.source["identity"], info.source["path"]),
        }
        for name in (each.name for each in self._latents if each.name in info.modalities):
            described, encoder = info.modalities[name], info.modalities[name]["encoder"]
            identity = encoder.get("distilled", encoder["fingerprint"])
            settings[f"encoder of {name}"] = Made(identity, encoder["checkpoint"])
            settings["posterior"] = described["posterior"]
            if "stride" in described:
                settings["motion_stride"] = described["stride"]
            if "delay" in described:
                settings["depth_delay"] = described["delay"]
        return settings

    def prepare(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def frames(self, number: int) -> Frames:
        for episode in self._original.index.episodes_of(number):
            name = str(self._original.index.episodes[episode])
            members = [each.members(episode, self._sample, self._batch_size) for each in self._latents]
            # an episode ends before the first frame that one of them cannot read
            for parts in zip(*members, strict=False):
                yield name, dict(chain.from_iterable(part.items() for part in parts))

    def is_described(self, info: DatasetInfo) -> bool:
        return all("mean" in info.modalities[each.name] for each in self._latents)

    def describe(self, root: Path, info: DatasetInfo, index: ShardIndex) -> DatasetInfo:
        """Add the statistics of the training latents."""
        described = {}
        for each in self._latents:
            mean, std = measure(_written(root, set(info.splits["train"]), index, each))
            described[each.name] = info.modalities[each.name] | {"mean": mean.tolist(), "std": std.tolist()}
        return replace(info, modalities=info.modalities | described)


def _written(root: Path, episodes: set[str], index: ShardIndex, latents: _Latents) -> Iterator[np.ndarray]:
    """Yield float[c, ...] of each frame of some episodes of the finished shards."""
    reader = ShardReader(root, None, "")
    for episode, name in enumerate(index.episodes.tolist()):
        if name in episodes:
            every = range(int(index.episode_frames[episode]))
            for members in read_members(reader, index, episode, every, [latents.extension])[0]:
                latent = codecs.decode_array(members[latents.extension])
                yield latent.T if latents.encoder.is_of_sound else latent


def measure(latents: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Compute the mean and the standard deviation of each channel over frames and positions.

    Args:
        latents: Arrays, float[c, ...] each.

    Returns:
        Two float64[c].

    Raises:
        OwlError: There are no latents.
    """
    count, total, squares = 0, np.zeros(()), np.zeros(())
    for latent in latents:
        values = latent.reshape(len(latent), latent[0].size).astype(np.float64)
        count += values.shape[1]
        total = total + values.sum(axis=1)
        squares = squares + np.square(values).sum(axis=1)
    if not count:
        raise OwlError(
            "dataset.empty-split",
            "no training episode could be encoded, expected at least one; make the source dataset again",
        )
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - np.square(mean), 0))
