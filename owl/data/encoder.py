"""Latent datasets: the pictures of a dataset, encoded once and for all by a trained autoencoder."""

import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from owl.data import codecs
from owl.data.jobs import Frames, Made, ShardJob, local_folder, run
from owl.data.modalities.base import Sampling
from owl.data.modalities.rgb import Rgb
from owl.data.reader import ShardReader, damage, read_members
from owl.data.shards import DatasetInfo, ShardIndex
from owl.errors import OwlError, at_least
from owl.version import code_version

EXTENSION = "latent.npy"


@dataclass(frozen=True)
class FrameEncoder:
    """An image autoencoder, and what a dataset says of it.

    Attributes:
        network: With ``encode(float[B, 3, H, W] in [-1, 1])`` giving a posterior, ``size`` (H, W), ``latent_channels``
            and ``latent_size``.
        fingerprint: Tells encoders apart by their weights.
        class_path: Of the network's class.
        checkpoint: Where the network was read from.
    """

    network: nn.Module
    fingerprint: str
    class_path: str
    checkpoint: str

    @property
    def identity(self) -> dict[str, str]:
        """How ``dataset.json`` names it."""
        return {"fingerprint": self.fingerprint, "class_path": self.class_path, "checkpoint": self.checkpoint}

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the pictures that it encodes."""
        height, width = self.network.size  # type: ignore[misc]
        return int(height), int(width)

    @property
    def latent_shape(self) -> list[int]:
        """[c, h, w] of a frame's latent."""
        return [int(n) for n in (self.network.latent_channels, *self.network.latent_size)]  # type: ignore[misc]


@dataclass(frozen=True)
class Source:
    """The dataset that is encoded.

    Attributes:
        url: Its folder, any fsspec URL.
        info: Its description.
        index: Its index.
        kept: Modalities that are copied, in the order of its members.
    """

    url: str
    info: DatasetInfo
    index: ShardIndex
    kept: tuple[str, ...]

    @classmethod
    def open(cls, url: str, keep: Sequence[str] | None) -> "Source":
        """Open a dataset; ``keep`` names the modalities to copy, None means controls if there are any.

        Raises:
            OwlError: It is no finished dataset, has no pictures, no training split, or not what is to be kept.
        """
        info = DatasetInfo.load(url)
        index = ShardIndex.load(url)
        stored = ", ".join(info.modalities)
        wanted = [name for name in ("controls",) if name in info.modalities] if keep is None else list(keep)
        for name in ("rgb", *wanted):
            if name not in info.modalities:
                raise OwlError(
                    "dataset.modalities",
                    f"{url} has no {name} to encode or to keep, it holds {stored}; ask for what is there",
                )
        if "latent" in wanted:
            raise OwlError(
                "dataset.modalities",
                f"the latent of {url} has no place beside the new one; leave it out of what is kept",
            )
        if not info.splits.get("train"):
            raise OwlError(
                "dataset.empty-split",
                f"the train split of {url} is empty, the latents' mean and standard deviation are those of its frames; "
                "record or import more episodes",
            )
        return cls(str(url), info, index, tuple(name for name in info.modalities if name in wanted))

    @property
    def identity(self) -> str:
        """That of the dataset (`DatasetInfo.identity`)."""
        return self.info.identity(self.index)


def encode_dataset(
    encoder: FrameEncoder,
    source: str,
    directory: str | Path,
    *,
    keep: Sequence[str] | None = None,
    sample: bool = False,
    batch_size: int = 64,
    workers: int = 0,
) -> DatasetInfo:
    """Write a dataset of latents, or finish one that was interrupted (`owl.data.jobs.run`).

    An episode with a damaged member ends before it, with a warning.

    Args:
        encoder: The autoencoder; it is moved to the GPU if there is one.
        source: The dataset to encode, any fsspec URL.
        directory: Local folder for the new dataset.
        keep: Modalities of the source to copy byte for byte; None keeps controls if there are any.
        sample: Whether to store a draw of each posterior rather than its mean.
        batch_size: Frames that are encoded together.
        workers: Processes, each with the network; 0 encodes in this one.

    Returns:
        The description of the finished dataset.

    Raises:
        OwlError: As `run`; or the source cannot be encoded (`Source.open`), its pictures have another size than the
            encoder's, or the encoder gives NaN.
    """
    root = local_folder(directory)
    at_least(1, batch_size=batch_size)
    original = Source.open(source, keep)
    if original.info.size != encoder.size:
        found, expected = ("x".join(map(str, size)) for size in (original.info.size, encoder.size))
        raise OwlError(
            "dataset.size",
            f"the pictures of {source} are {found} (height x width), the encoder of {encoder.checkpoint} takes "
            f"{expected}; use footage of that size or an encoder that was trained on this one",
        )
    return run(_EncodeJob(encoder, original, sample, batch_size), root, workers)


class _EncodeJob(ShardJob):
    """Latents of a dataset, divided into the same shards."""

    doing, kinds = "encoding", ("encoded",)

    def __init__(self, encoder: FrameEncoder, original: Source, sample: bool, batch_size: int) -> None:
        self._encoder, self._original, self._sample, self._batch_size = encoder, original, sample, batch_size
        self.shards = original.index.frames_of_shards()
        latent: dict[str, Any] = {
            "extension": EXTENSION,
            "encoding": "npy float16[c, h, w]",
            "shape": encoder.latent_shape,
            "posterior": "sample" if sample else "mean",
            "encoder": encoder.identity,
        }
        self.info = DatasetInfo(
            fps=original.info.fps,
            size=original.info.size,
            modalities={"latent": latent, **{name: original.info.modalities[name] for name in original.kept}},
            splits=original.info.splits,
            source={
                "kind": "encoded",
                "path": original.url,
                "identity": original.identity,
                "checkpoint": encoder.checkpoint,
            },
            code_version=code_version(),
        )

    def settings(self, info: DatasetInfo) -> dict[str, Any]:
        latent = info.modalities["latent"]
        return {
            "encoder": Made(latent["encoder"]["fingerprint"], latent["encoder"]["checkpoint"]),
            "source": Made(info.source["identity"], info.source["path"]),
            "posterior": latent["posterior"],
            "modalities": ", ".join(info.modalities),
        }

    def prepare(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def frames(self, number: int) -> Frames:
        """One thread reads and decodes ahead of the encoder."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = self._encoder.network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        index = self._original.index
        reader = _FrameReader(self._original, pin=device.type == "cuda")
        with ThreadPoolExecutor(1) as pool:
            for episode in index.episodes_of(number):
                name = str(index.episodes[episode])
                # the noise depends on the episode alone, not on where an interrupted run goes on
                noise = torch.Generator(device).manual_seed(zlib.crc32(name.encode())) if self._sample else None
                for pictures, kept in reader.batches(episode, self._batch_size, pool):
                    latents = _encode(network, pictures.to(device, non_blocking=True), noise)
                    if not np.isfinite(latents).all():
                        raise OwlError(
                            "latents.non-finite",
                            f"the encoder of {self._encoder.checkpoint} gives latents of episode {name} that are no "
                            "finite float16; use a checkpoint of a run that did not diverge",
                        )
                    for latent, members in zip(latents, kept, strict=True):
                        yield name, {EXTENSION: codecs.encode_array(latent), **members}

    def is_described(self, info: DatasetInfo) -> bool:
        return "mean" in info.modalities["latent"]

    def describe(self, root: Path, info: DatasetInfo, index: ShardIndex) -> DatasetInfo:
        """Add the statistics of the training latents."""
        train, reader = set(info.splits["train"]), ShardReader(root, None, "")
        mean, std = measure(
            codecs.decode_array(members[EXTENSION])
            for episode, name in enumerate(index.episodes.tolist())
            if name in train
            for members in read_members(reader, index, episode, range(int(index.episode_frames[episode])), [EXTENSION])[
                0
            ]
        )
        latent = info.modalities["latent"] | {"mean": mean.tolist(), "std": std.tolist()}
        return replace(info, modalities=info.modalities | {"latent": latent})


@torch.inference_mode()
def _encode(network: nn.Module, pictures: Tensor, noise: torch.Generator | None) -> np.ndarray:
    """uint8[B, 3, H, W] to float16[B, c, h, w]; with a source of noise draws of the posteriors, else their means."""
    image = pictures.contiguous(memory_format=torch.channels_last).float() / 127.5 - 1
    posterior = network.encode(image)  # type: ignore[operator]
    latent = posterior.mean if noise is None else posterior.sample(noise)
    return latent.half().contiguous().cpu().numpy()


class _FrameReader:
    """Reads a dataset's frames in batches of consecutive ones, each with one contiguous read."""

    def __init__(self, original: Source, pin: bool) -> None:
        self._original, self._pin = original, pin
        self._reader = ShardReader(original.url, None, original.identity)
        info = original.info
        self._decoder = Rgb("rgb", info.modalities["rgb"], Sampling(original.url, info.fps, info.size))
        self._rgb, *self._kept = (original.info.modalities[name]["extension"] for name in ("rgb", *original.kept))

    def batches(
        self, episode: int, batch_size: int, pool: ThreadPoolExecutor
    ) -> Iterator[tuple[Tensor, list[dict[str, bytes]]]]:
        """Yield an episode's frames, uint8[B, 3, H, W], each with the members to keep by extension.

        The next batch is decoded in the pool meanwhile. At a damaged member the episode ends, with a warning.
        """
        frames = int(self._original.index.episode_frames[episode])
        following = pool.submit(self._batch, episode, 0, min(batch_size, frames))
        for first in range(0, frames, batch_size):
            pictures, kept, wrong = following.result()
            stop = first + batch_size
            if stop < frames and wrong is None:
                following = pool.submit(self._batch, episode, stop, min(stop + batch_size, frames))
            if kept:
                yield pictures, kept
            if wrong is not None:
                warnings.warn(f"{self._original.url}: {wrong}; the episode ends before it", stacklevel=3)
                return

    def _batch(self, episode: int, first: int, stop: int) -> tuple[Tensor, list[dict[str, bytes]], str | None]:
        """Frames [first, stop) up to the first damaged one, and what is wrong with that."""
        index = self._original.index
        wanted = dict.fromkeys((self._rgb, *self._kept))
        members, wrong = read_members(self._reader, index, episode, range(first, stop), list(wanted))
        height, width = self._original.info.size
        pictures = torch.empty((stop - first, 3, height, width), dtype=torch.uint8, pin_memory=self._pin)
        for position, found in enumerate(members):
            try:
                absent = [extension for extension in wanted if extension not in found]
                if absent:
                    raise ValueError(f"it has no {absent[0]}")
                picture = self._decoder.decode(found[self._rgb])
            except ValueError as error:
                members, wrong = members[:position], damage(index, episode, first + position, error)
                break
            pictures[position] = torch.from_numpy(picture).movedim(-1, 0)
        kept = [{extension: found[extension] for extension in self._kept} for found in members]
        return pictures[: len(members)], kept, wrong


def measure(latents: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel over frames and positions.

    Args:
        latents: float[c, h, w] each.

    Returns:
        Two float64[c].

    Raises:
        OwlError: There are no latents.
    """
    count, total, squares = 0, np.zeros(()), np.zeros(())
    for latent in latents:
        values = latent.reshape(len(latent), -1).astype(np.float64)
        count += values.shape[1]
        total = total + values.sum(axis=1)
        squares = squares + np.square(values).sum(axis=1)
    if not count:
        raise OwlError(
            "dataset.empty-split",
            "no training episode could be encoded, at least one was expected; make the source dataset again",
        )
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - np.square(mean), 0))
