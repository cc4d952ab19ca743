"""What rollouts are compared with: windows of a dataset of latents, and the true pictures of their frames."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from owl import models
from owl.data.controls import check_controls
from owl.data.shards import DatasetInfo
from owl.data.windows import WindowDataset
from owl.errors import OwlError
from owl.latents import check_encoder, tells_encoder
from owl.models.world_model import Controls, Streams, WorldTransformer
from owl.nn.placement import placement
from owl.pixels import to_uint8

Batch = dict[str, Tensor]

DECODED_TOGETHER = 32  # frames: bounds the memory of the decoder


class Episodes:
    """A split of a dataset of latents, as a world model takes it.

    Args:
        url: The dataset's folder, any fsspec URL.
        split: "train", "validation" or "test".
        network: The world model.
        decoder: The autoencoder of the dataset's video latents.
        stride: Stored frames from one frame of the model to the next.
        length: Frames in a window.
        device: Where the decoder is.

    Attributes:
        truth: What true pictures are: "rgb", the dataset's own if it keeps them, else "latent", its latents decoded.

    Raises:
        OwlError: The dataset lacks what the world model needs, is of another encoder or other controls, or has no
            window of this length.
    """

    def __init__(
        self,
        url: str | Path,
        split: str,
        network: WorldTransformer,
        decoder: nn.Module,
        stride: int,
        length: int,
        device: torch.device | str = "cpu",
    ) -> None:
        info = DatasetInfo.load(url)
        check_dataset(network, info, str(url))
        self.truth = "rgb" if "rgb" in info.modalities else "latent"
        modalities = [*network.latent_modalities.values(), "controls", *(["rgb"] if self.truth == "rgb" else [])]
        # windows overlap by a frame: the controls of a window's first frame are not those since the frame before it
        self.dataset = WindowDataset(
            url, split, modalities, length=length, stride=stride, hop=max(1, (length - 1) * stride)
        )
        self.decoder, self.device = decoder, torch.device(device)
        self._generated = {name: network.latent_modalities[name] for name in network.generated}
        self._given = {name: network.latent_modalities[name] for name in network.given}
        self.fps = self.dataset.info.fps / stride

    def windows(self, count: int) -> Batch:
        """At most ``count`` windows, evenly spaced over the split: see `WindowDataset`, stacked."""
        last = len(self.dataset) - 1
        chosen = torch.linspace(0, last, min(count, last + 1), dtype=torch.float64).round().long()
        return self.dataset.batch(chosen.tolist())

    def latents(self, batch: Batch, frames: slice = slice(None)) -> Streams:
        """The world model's streams of windows."""
        return {name: batch[modality][:, frames] for name, modality in self._generated.items()}

    def controls(self, batch: Batch, frames: slice = slice(None)) -> Controls:
        """Controls of windows, and what the world model is given beside them."""
        given = {name: batch[modality][:, frames] for name, modality in self._given.items()}
        return Controls(batch["buttons"][:, frames], batch["axes"][:, frames], given=given)

    def given(self, frame: Batch) -> tuple[Tensor, Tensor, Streams]:
        """What `Engine.step` takes, of a frame of `stream`."""
        return frame["buttons"], frame["axes"], {name: frame[modality] for name, modality in self._given.items()}

    def pictures(self, batch: Batch) -> Tensor:
        """True pictures of windows, uint8[B, T, 3, H, W] on the CPU."""
        if self.truth == "rgb":
            return batch["rgb"]
        return self.decode(batch[self._generated["video"]])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode video latents float[B, T, c, h, w] to uint8[B, T, 3, H, W] on the CPU."""
        dtype = placement(self.decoder).dtype
        parts = [
            as_bytes(self.decoder.decode(part.to(self.device, dtype)))  # type: ignore[operator]
            for part in latents.flatten(0, 1).split(DECODED_TOGETHER)
        ]
        return torch.cat(parts).unflatten(0, latents.shape[:2])

    def stream(self, rows: int, skip: int) -> Iterator[Batch]:
        """Frames of the split one after another, endlessly, in several rows that begin at different places.

        Args:
            rows: How many.
            skip: Frames to leave out at the beginning, those of the context of `starts`.

        Yields:
            A frame of each row: what `windows` gives, without the axis of time.
        """
        for frames in zip(*(self._row(window, skip) for window in self._first_windows(rows)), strict=True):
            yield {name: torch.stack([frame[name] for frame in frames]) for name in frames[0]}

    def _row(self, window: int, skip: int) -> Iterator[Batch]:
        """The frames from a window on, each once: an episode's last window overlaps the one before by more than one."""
        before: dict[str, Any] | None = None
        while True:
            sample = self.dataset[window % len(self.dataset)]
            place = self.dataset.describe(int(sample.pop("window")))  # of another window where this one is damaged
            begin = skip if before is None else 1  # what led to an episode's first frame is not known
            if before and place["episode"] == before["episode"] and place["frames"][0] > before["frames"][0]:
                following = before["frames"][1] + self.dataset.stride
                begin = max(1, -(-(following - place["frames"][0]) // self.dataset.stride))
            for frame in range(begin, self.dataset.length):
                yield {name: values[frame] for name, values in sample.items()}
            before, window = place, window + 1

    def starts(self, rows: int) -> Batch:
        """The windows that `stream` begins with."""
        return self.dataset.batch(self._first_windows(rows))

    def _first_windows(self, rows: int) -> list[int]:
        return [row * len(self.dataset) // rows for row in range(rows)]


def as_bytes(pictures: Tensor) -> Tensor:
    """float[..., H, W] in [-1, 1], clipped, to uint8 on the CPU."""
    return to_uint8(pictures).cpu()


def check_dataset(network: WorldTransformer, info: DatasetInfo, url: str) -> None:
    """Refuse a dataset that is not of the kind that a world model was trained on.

    Raises:
        OwlError: It lacks latents or controls, or they are of another encoder or other names.
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
        OwlError: The file is missing or damaged, or holds a network of another kind.
    """
    network = models.load(path)
    if not (hasattr(network, "decode") and tells_encoder(network)):
        raise OwlError(
            "network.kind",
            f"the network of {path} is {type(network).__qualname__}, an autoencoder was expected to decode the "
            "latents, or a decoder that names its encoder; give the checkpoint that the dataset was encoded with",
        )
    return network


def trained_stride(content: dict[str, Any]) -> int:
    """The stride of the data that a checkpoint was trained with, from its content; 1 where it says nothing."""
    data = content["owl"]["config"].get("data") or {}
    return int((data.get("init_args") or {}).get("stride", 1))
