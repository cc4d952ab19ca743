"""Ground truth of rollouts: windows of a dataset of latents, and the true pictures of their frames."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from owl import models
from owl.data.controls import check_controls
from owl.data.shards import DatasetInfo
from owl.data.windows import WindowDataset
from owl.errors import OwlError
from owl.latents import check_encoder, identifies_encoder
from owl.models.image_decoder import decode_clips
from owl.models.world_model import Controls, Streams, WorldTransformer
from owl.nn.placement import placement
from owl.pixels import to_float, to_uint8
from owl.rollout.engine import Engine
from owl.rollout.sound import by_frame, decode_sound
from owl.spacing import evenly_spaced

Batch = dict[str, Tensor]

DECODED_TOGETHER = 32  # frames: bounds the memory of the decoder


class Episodes:
    """A split of a dataset of latents, in the input format of a world model.

    Args:
        url: The dataset's folder, any fsspec URL.
        info: The content of its dataset.json.
        split: "train", "validation" or "test".
        network: The world model.
        decoder: The autoencoder of the dataset's video latents.
        stride: Stored frames from one frame of the model to the next.
        length: Frames in a window.
        device: Device of the decoder.
        sound_decoder: The autoencoder of the dataset's sound, if the world model generates sound and it is to be heard.

    Attributes:
        truth: Source of true pictures: "rgb", the dataset's pictures if it has them, else "latent", decoded latents.
        sound_truth: Source of true sound: "audio", the dataset's sound if it has it, "audio_latent", decoded latents,
            or None without ``sound_decoder``.

    Raises:
        OwlError: The dataset lacks a modality of the world model, has another encoder or other controls, or has no
            window of this length.
    """

    def __init__(
        self,
        url: str | Path,
        info: DatasetInfo,
        split: str,
        network: WorldTransformer,
        decoder: nn.Module,
        stride: int,
        length: int,
        device: torch.device | str = "cpu",
        sound_decoder: nn.Module | None = None,
    ) -> None:
        check_dataset(network, info, str(url))
        self.truth = "rgb" if "rgb" in info.modalities else "latent"
        self.sound_truth: str | None = None
        if sound_decoder is not None:
            self.sound_truth = "audio" if "audio" in info.modalities else network.latent_modalities["audio"]
        self._played = [*network.latent_modalities.values(), "controls", *(["rgb"] if self.truth == "rgb" else [])]
        measured = ["audio"] if self.sound_truth == "audio" else []
        measured += ["flow"] if "flow" in info.modalities else []
        # windows overlap by a frame, since the controls of a window's first frame do not cover a whole stride
        hop = max(1, (length - 1) * stride)
        self.dataset = WindowDataset(
            url, split, [*self._played, *measured], length=length, stride=stride, hop=hop, info=info
        )
        self.decoder, self.device, self.sound_decoder = decoder, torch.device(device), sound_decoder
        self._generated = {name: network.latent_modalities[name] for name in network.generated}
        self._given = {name: network.latent_modalities[name] for name in network.given}
        self.fps = self.dataset.info.fps / stride

    def windows(self, count: int, measured: bool = False) -> Batch:
        """Return at most ``count`` windows, evenly spaced over the split and stacked: see `WindowDataset`.

        Args:
            count: Number of windows.
            measured: Whether to add what is measured of `owl.rollout.evaluation.Clips`, where the dataset has it: its
                "flow", and, with a decoder of sound, "audio" as float[B, T, channels, samples].
        """
        found = self.dataset.batch(evenly_spaced(len(self.dataset), count), None if measured else self._played)
        return found | ({"audio": self._by_frame(found["audio"])} if "audio" in found else {})

    def batch(self, windows: Sequence[int]) -> Batch:
        """Return several windows, stacked, without what is only measured."""
        return self.dataset.batch(windows, self._played)

    def _by_frame(self, sound: Tensor) -> Tensor:
        """Divide sound into frames; the first one starts with silence if a stride skips frames."""
        length = self.dataset.length
        samples = round(self.dataset.info.modalities["audio"]["sample_rate"] / self.fps)
        return by_frame(torch.nn.functional.pad(sound, (length * samples - sound.shape[-1], 0)), length)

    def latents(self, batch: Batch, frames: slice = slice(None)) -> Streams:
        """Return the world model's streams of windows."""
        return {name: batch[modality][:, frames] for name, modality in self._generated.items()}

    def controls(self, batch: Batch, frames: slice = slice(None)) -> Controls:
        """Return the controls of windows, including given streams."""
        given = {name: batch[modality][:, frames] for name, modality in self._given.items()}
        return Controls(batch["buttons"][:, frames], batch["axes"][:, frames], given=given)

    def start(self, engine: Engine, batch: Batch, context: int, seed: int = 0) -> None:
        """Reset an engine after the first frames of windows.

        Args:
            engine: The engine.
            batch: The windows.
            context: Number of these frames, at least 1.
            seed: Seed of all noise.
        """
        given = slice(context)
        picture = to_float(batch["rgb"][:, context - 1]) if self.truth == "rgb" else None
        engine.reset(self.latents(batch, given), self.controls(batch, given), seed=seed, picture=picture)

    def given(self, frame: Batch) -> tuple[Tensor, Tensor, Streams]:
        """Return the arguments of `Engine.step` for a frame of `stream`."""
        return frame["buttons"], frame["axes"], {name: frame[modality] for name, modality in self._given.items()}

    def pictures(self, batch: Batch) -> Tensor:
        """Return the true pictures of windows, uint8[B, T, 3, H, W] on the CPU."""
        if self.truth == "rgb":
            return batch["rgb"]
        return self.decode(batch[self._generated["video"]])

    @torch.no_grad()
    def sound(self, batch: Batch) -> Tensor:
        """Return the true sound of windows, float[B, T, channels, samples] on the CPU."""
        if self.sound_truth == "audio":
            return batch["audio"]
        assert self.sound_decoder is not None
        return decode_sound(self.sound_decoder, batch[self._generated["audio"]])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode clips of video latents float[B, T, c, h, w] to uint8[B, T, 3, H, W] on the CPU."""
        dtype = placement(self.decoder).dtype
        together = max(1, DECODED_TOGETHER // latents.shape[1])
        parts = [as_bytes(decode_clips(self.decoder, part.to(self.device, dtype))) for part in latents.split(together)]
        return torch.cat(parts)

    def stream(self, rows: int, skip: int) -> Iterator[Batch]:
        """Yield the frames of the split in order, endlessly, in several rows that start at different positions.

        Args:
            rows: Number of rows.
            skip: Frames to skip at the start, the context of `starts`.

        Yields:
            A frame of each row: as `windows`, without the time axis.
        """
        for frames in zip(*(self._row(window, skip) for window in self._first_windows(rows)), strict=True):
            yield {name: torch.stack([frame[name] for frame in frames]) for name in frames[0]}

    def _row(self, window: int, skip: int) -> Iterator[Batch]:
        """Yield the frames from a window on, each once: the last window of an episode overlaps by more than a frame."""
        before: dict[str, Any] | None = None
        while True:
            batch = self.batch([window % len(self.dataset)])
            sample = {name: values[0] for name, values in batch.items()}
            place = self.dataset.describe(int(sample.pop("window")))  # of another window if this one is damaged
            begin = skip if before is None else 1  # the controls of an episode's first frame are unknown
            if before and place["episode"] == before["episode"] and place["frames"][0] > before["frames"][0]:
                following = before["frames"][1] + self.dataset.stride
                begin = max(1, -(-(following - place["frames"][0]) // self.dataset.stride))
            for frame in range(begin, self.dataset.length):
                yield {name: values[frame] for name, values in sample.items()}
            before, window = place, window + 1

    def starts(self, rows: int) -> Batch:
        """Return the first windows of `stream`."""
        return self.batch(self._first_windows(rows))

    def _first_windows(self, rows: int) -> list[int]:
        return [row * len(self.dataset) // rows for row in range(rows)]


def as_bytes(pictures: Tensor) -> Tensor:
    """Convert float[..., H, W] in [-1, 1], clipped, to uint8 on the CPU."""
    return to_uint8(pictures).cpu()


def check_dataset(network: WorldTransformer, info: DatasetInfo, url: str) -> None:
    """Check that a dataset matches the dataset on which a world model was trained.

    Raises:
        OwlError: It lacks latents or controls, or has another encoder or other names.
    """
    for needed in (*network.latent_modalities.values(), "controls"):
        if needed not in info.modalities:
            raise OwlError(
                "dataset.modalities",
                f"{url} has no {needed}, it holds {', '.join(info.modalities)}; give the dataset of latents that the "
                "world model was trained on, or encode footage with `python -m owl data encode`",
            )
    check_encoder(network, info.modalities, url)
    advice = "give a dataset with the {kind} that the world model was trained with, in the same order"
    check_controls(info.modalities, url, network.buttons, network.axes, advice)


def load_decoder(path: str | Path) -> nn.Module:
    """Load the autoencoder of video latents, or a decoder that was trained on them.

    Raises:
        OwlError: The file is missing or damaged, or contains a different kind of network.
    """
    network = models.load(path)
    if not (hasattr(network, "decode") and identifies_encoder(network)):
        raise OwlError(
            "network.kind",
            f"the network of {path} is {type(network).__qualname__}, expected an autoencoder or a decoder that "
            "names its encoder; give the checkpoint that the dataset was encoded with",
        )
    return network
