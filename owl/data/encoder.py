"""Latent datasets: one or more modalities of a dataset, encoded once by a trained network."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from owl.data import codecs
from owl.data.jobs import Frames, Made, ShardJob, local_folder, run
from owl.data.modalities import MODALITIES
from owl.data.modalities.base import Clock
from owl.data.modalities.latents import AudioLatent, Latent
from owl.data.reader import ShardReader, read_members
from owl.data.shards import DatasetInfo, ShardIndex
from owl.data.source import SampleReader, Source
from owl.errors import OwlError, at_least
from owl.nn.placement import placement
from owl.pixels import to_float

LATENT_NAMES = {"rgb": "latent", "flow": "motion_latent"}
"""Name of latents by their first modality, if it is not the modality's name with ``_latent``."""


@dataclass(frozen=True)
class FrameEncoder:
    """A network that encodes frames or sound, and its entry in the description of a dataset.

    The network's class declares its inputs and outputs:

    - ``modalities``: the channels of each modality, in the order of ``encode``'s arguments, such as ``{"rgb": 3}``.
    - ``encode``: maps one tensor per modality to a posterior (`owl.nn.posterior.Posterior`). Tensors are as in windows,
      except for pictures, which are in [-1, 1]: rgb float[B, 3, H, W] in [-1, 1], depth float[B, 1, H, W] in [0, 1],
      flow float[B, 2, h, w] in pixels, audio float[1, channels, samples] in [-1, 1]. B consecutive frames give a mean
      of [B, latent_channels, *latent_size]; the sound of a whole episode gives [1, latent_channels, tokens].
    - ``latent_channels``; for frames ``latent_size`` (h, w) and ``size``, the required (H, W) of the first modality;
      for sound ``sample_rate`` and ``hop``, the number of samples per token.

    Attributes:
        network: The network.
        fingerprint: Hash of the weights, which identifies the encoder; for one that imitates another, that of the
            other.
        class_path: Class path of the network.
        checkpoint: Path from which the network was loaded.
        distilled: Hash of its own weights if it imitates another encoder, else None.
    """

    network: Any
    fingerprint: str
    class_path: str
    checkpoint: str
    distilled: str | None = None

    @property
    def identity(self) -> dict[str, str]:
        """The entry of the encoder in ``dataset.json``."""
        entry = {"fingerprint": self.fingerprint, "class_path": self.class_path, "checkpoint": self.checkpoint}
        return entry if self.distilled is None else entry | {"distilled": self.distilled}

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the first modality of the encoded frames."""
        height, width = self.network.size
        return height, width

    @property
    def latent_shape(self) -> list[int]:
        """[c, h, w] of a frame's latent."""
        return [self.network.latent_channels, *self.network.latent_size]

    @property
    def is_of_sound(self) -> bool:
        """Whether its latents are tokens with a separate rate rather than one grid per frame."""
        return "audio" in self.network.modalities

    def find_name(self, name: str | None) -> str:
        """Return the name of its latents in a dataset, by default ``latent``, ``audio_latent``, ``motion_latent`` ...

        Raises:
            OwlError: There are no latents with this name, or they are of the other kind (sound or frames).
        """
        first = next(iter(self.network.modalities))
        name = name or LATENT_NAMES.get(first, f"{first}_latent")
        latents = {known: kind for known, kind in MODALITIES.items() if issubclass(kind, Latent)}
        fitting = [known for known, kind in latents.items() if issubclass(kind, AudioLatent) == self.is_of_sound]
        if name not in fitting:
            raise OwlError(
                "arguments.wrong-value",
                f"latents of {', '.join(self.network.modalities)} cannot be named {name}, expected "
                f"{' or '.join(fitting)}; set --name to one of these",
            )
        return name

    def clock(self, fps: float) -> Clock:
        """Return the clock of sound tokens relative to frames."""
        return Clock(self.network.sample_rate / self.network.hop, fps)

    def layout(self, source: Source) -> dict[str, Any]:
        """Return the description of the latents for dataset.json.

        Raises:
            OwlError: The channels, the size or the rate of the dataset differ from those of the network.
        """
        network, url, takes = self.network, source.url, f"the encoder of {self.checkpoint} takes"
        shapes = {name: next(iter(source.modality(name, 1).shapes().values()))[0] for name in source.taken}
        for name, channels in network.modalities.items():
            found = shapes[name][0 if name == "audio" else 1]
            if found != channels:
                raise OwlError(
                    "network.input",
                    f"{name} of {url} has {found} channels, {takes} {channels}; use another dataset or encoder",
                )
        if self.is_of_sound:
            rate = source.info.modalities["audio"]["sample_rate"]
            if rate != network.sample_rate:
                raise OwlError(
                    "network.input",
                    f"audio of {url} has {rate} samples a second, {takes} {network.sample_rate}; use another dataset "
                    "or encoder",
                )
            clock = self.clock(source.info.fps)
            if clock.least(1) == clock.most(1):
                return {"encoding": "npy float16[k, c]", "shape": [clock.least(1), network.latent_channels]}
            return {"encoding": "npy float16[tokens, c]", "shape": [network.latent_channels], "rate": clock.rate}
        size = shapes[source.taken[0]][2:]
        if size != self.size:
            stored, expected = ("x".join(map(str, sides)) for sides in (size, self.size))
            raise OwlError(
                "dataset.size",
                f"the {source.taken[0]} of {url} is {stored} (height x width), {takes} {expected}; use footage of that "
                "size or an encoder that was trained on this one",
            )
        return {"encoding": "npy float16[c, h, w]", "shape": self.latent_shape}

    @torch.inference_mode()
    def encode(self, sample: dict[str, Tensor], noise: torch.Generator | None) -> np.ndarray:
        """Encode consecutive frames of an episode.

        Args:
            sample: The network's modalities, as in a window.
            noise: Generator for sampling the posteriors; None uses their means.

        Returns:
            float16[B, c, h, w], or for sound float16[tokens, c].
        """
        device = placement(self.network).device
        inputs = []
        for tensor in sample.values():
            on_device = (tensor[None] if self.is_of_sound else tensor).to(device, non_blocking=True)
            if on_device.ndim == 4:
                on_device = on_device.contiguous(memory_format=torch.channels_last)
            inputs.append(to_float(on_device) if tensor.dtype == torch.uint8 else on_device)
        posterior = self.network.encode(*inputs)
        latent = posterior.mean if noise is None else posterior.sample(noise)
        latent = latent[0].T if self.is_of_sound else latent
        return latent.half().contiguous().cpu().numpy()


def encode_dataset(
    encoder: FrameEncoder,
    source: str,
    directory: str | Path,
    *,
    name: str | None = None,
    keep: Sequence[str] | None = None,
    sample: bool = False,
    batch_size: int = 64,
    workers: int = 0,
) -> DatasetInfo:
    """Write a dataset of latents, or finish one that was interrupted (`owl.data.jobs.run`).

    An episode with a damaged member is truncated before it, with a warning.

    Args:
        encoder: The network; it is moved to the GPU if there is one.
        source: The dataset to encode, any fsspec URL.
        directory: Local folder for the new dataset.
        name: Name of the latents (`FrameEncoder.find_name`).
        keep: Modalities of the source to copy byte for byte; None keeps controls if there are any.
        sample: Whether to store a sample of each posterior rather than its mean.
        batch_size: Frames per batch; sound is encoded one episode at a time.
        workers: Number of worker processes, each with a copy of the network; 0 encodes in this process.

    Returns:
        The description of the finished dataset.

    Raises:
        OwlError: As `run`; or the source lacks a modality of the network (`Source.open`, `FrameEncoder.layout`) or has
            no training split, or the network returns NaN or latents with a shape other than declared.
    """
    root = local_folder(directory)
    at_least(1, batch_size=batch_size)
    original = Source.open(source, encoder.network.modalities, keep)
    name = encoder.find_name(name)
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
    return run(_EncodeJob(encoder, original, name, sample, batch_size), root, workers)


class _EncodeJob(ShardJob):
    """Latents of a dataset, divided into the same shards."""

    doing, kinds = "encoding", ("encoded",)

    def __init__(self, encoder: FrameEncoder, original: Source, name: str, sample: bool, batch_size: int) -> None:
        self._encoder, self._original, self._sample, self._batch_size = encoder, original, sample, batch_size
        self._name, self._extension = name, MODALITIES[name].extension
        self.shards = original.index.frames_of_shards()
        latent: dict[str, Any] = {
            "extension": self._extension,
            **encoder.layout(original),
            "posterior": "sample" if sample else "mean",
            "encoder": encoder.identity,
        }
        kept = {kept: original.info.modalities[kept] for kept in original.kept}
        self.info = original.derive("encoded", {name: latent, **kept}, checkpoint=encoder.checkpoint)

    def settings(self, info: DatasetInfo) -> dict[str, Any]:
        settings = {
            "modalities": ", ".join(info.modalities),
            "source": Made(info.source["identity"], info.source["path"]),
        }
        if self._name in info.modalities:
            latent = info.modalities[self._name]
            encoder = latent["encoder"]
            settings["encoder"] = Made(encoder.get("distilled", encoder["fingerprint"]), encoder["checkpoint"])
            settings["posterior"] = latent["posterior"]
        return settings

    def prepare(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def frames(self, number: int) -> Frames:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._encoder.network.to(device=device, memory_format=torch.channels_last)
        index, reader = self._original.index, SampleReader(self._original, pin=device.type == "cuda")
        for episode in index.episodes_of(number):
            name = str(index.episodes[episode])
            # the noise depends only on the episode, not on where an interrupted run continues
            noise = torch.Generator(device).manual_seed(zlib.crc32(name.encode())) if self._sample else None
            together = int(index.episode_frames[episode]) if self._encoder.is_of_sound else self._batch_size
            for sample, kept in reader.stretches(episode, together):
                latents = self._divide(self._encoder.encode(sample, noise), len(kept))
                if not all(np.isfinite(latent).all() for latent in latents):
                    raise OwlError(
                        "latents.non-finite",
                        f"the encoder of {self._encoder.checkpoint} gives latents of episode {name} that are not "
                        "finite in float16; use a checkpoint of a run that did not diverge",
                    )
                for latent, members in zip(latents, kept, strict=True):
                    yield name, {self._extension: codecs.encode_array(latent), **members}

    def _divide(self, latents: np.ndarray, frames: int) -> list[np.ndarray]:
        """Return the latents of each frame; for sound the tokens that end within the frame."""
        shape, cuts = self.info.modalities[self._name]["shape"], list(range(frames + 1))
        if self._encoder.is_of_sound:
            shape, clock = shape[-1:], self._encoder.clock(self.info.fps)
            cuts = [clock.least(frame) for frame in cuts]
        if list(latents.shape[1:]) != shape or len(latents) < cuts[-1]:
            raise OwlError(
                "latents.shape",
                f"the encoder of {self._encoder.checkpoint} gives {list(latents.shape)} for {frames} frames, "
                f"expected {[cuts[-1], *shape]} as it declares; correct its class",
            )
        return [latents[a:b] if self._encoder.is_of_sound else latents[a] for a, b in pairwise(cuts)]

    def is_described(self, info: DatasetInfo) -> bool:
        return "mean" in info.modalities[self._name]

    def describe(self, root: Path, info: DatasetInfo, index: ShardIndex) -> DatasetInfo:
        """Add the statistics of the training latents."""
        mean, std = measure(self._latents(root, set(info.splits["train"]), index))
        latent = info.modalities[self._name] | {"mean": mean.tolist(), "std": std.tolist()}
        return replace(info, modalities=info.modalities | {self._name: latent})

    def _latents(self, root: Path, episodes: set[str], index: ShardIndex) -> Iterator[np.ndarray]:
        """Yield float[c, ...] of each frame of some episodes."""
        reader = ShardReader(root, None, "")
        for episode, name in enumerate(index.episodes.tolist()):
            if name in episodes:
                every = range(int(index.episode_frames[episode]))
                for members in read_members(reader, index, episode, every, [self._extension])[0]:
                    latent = codecs.decode_array(members[self._extension])
                    yield latent.T if self._encoder.is_of_sound else latent


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
