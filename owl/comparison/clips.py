"""Held-out clips with their latents."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from owl import models
from owl.data.shards import DatasetInfo
from owl.data.windows import WindowDataset
from owl.errors import OwlError
from owl.latents import LoadedEncoder, load_encoder
from owl.pixels import to_float
from owl.rollout.episodes import DECODED_TOGETHER
from owl.spacing import evenly_spaced


@dataclass(frozen=True)
class Clip:
    """Consecutive frames.

    Attributes:
        true: uint8[T, 3, H, W].
        latent: float[T, c, h, w], not standardised.
        flow: float[T, 2, h', w'], back to the frame before, in pixels of the frames; None if the dataset has none.
        source: Episode and frames.
    """

    true: Tensor
    latent: Tensor
    flow: Tensor | None
    source: str


class HeldOutClips:
    """Clips of a split with their latents, from the dataset or from an encoder.

    Args:
        url: The dataset's folder, any fsspec URL.
        split: "train", "validation" or "test".
        clips: Largest number of clips; they are evenly spaced and do not overlap.
        length: Frames in a clip.
        fingerprint: Of the encoder whose latents are needed.
        encoder: Autoencoder that encodes the pictures; None: the dataset contains latents.
        device: Device of the encoder.

    Raises:
        OwlError: The dataset has no pictures, has no latents and there is no encoder, its latents or the encoder are
            other ones, or it has no clip of this length.
    """

    def __init__(
        self,
        url: str,
        split: str,
        clips: int,
        length: int,
        fingerprint: str,
        encoder: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        info = DatasetInfo.load(url)
        if "rgb" not in info.modalities:
            raise OwlError(
                "dataset.modalities",
                f"{url} has no rgb, it holds {', '.join(info.modalities)}; give the footage, or a dataset of latents "
                "that was encoded with --keep rgb,flow",
            )
        self.encoder: LoadedEncoder | None = None
        if encoder is not None:
            self.encoder = load_encoder(models.find_checkpoint(encoder))
            self._check(f"the encoder of {encoder}", self.encoder.fingerprint, fingerprint)
            self.encoder.network.to(device).requires_grad_(False)
        elif "latent" in info.modalities:
            self._check(f"latent of {url}", info.modalities["latent"]["encoder"]["fingerprint"], fingerprint)
        else:
            raise OwlError(
                "compare.encoder",
                f"{url} has no latents, it holds {', '.join(info.modalities)}, and none of the decoders is an "
                f"autoencoder; give the checkpoint of the autoencoder with encoder {fingerprint} with --encoder",
            )
        needed = ["rgb", *(["flow"] if "flow" in info.modalities else []), *([] if self.encoder else ["latent"])]
        size = self.encoder.size if self.encoder else None
        self.dataset = WindowDataset(url, split, needed, length=length, hop=length, size=size, info=info)
        self.device = torch.device(device)
        self.windows = evenly_spaced(len(self.dataset), clips)

    @staticmethod
    def _check(what: str, found: str, expected: str) -> None:
        if found != expected:
            raise OwlError(
                "latents.encoder",
                f"{what} is of encoder {found}, the decoders were trained on latents of encoder {expected}; give "
                "footage without latents, or the autoencoder that the decoders were trained on",
            )

    @property
    def latent_shape(self) -> list[int]:
        """[c, h, w] of a frame's latent."""
        return self.encoder.latent_shape if self.encoder else list(self.dataset.info.modalities["latent"]["shape"])

    def __len__(self) -> int:
        return len(self.windows)

    def __iter__(self) -> Iterator[Clip]:
        for window in self.windows:
            sample = self.dataset[window]
            place = self.dataset.describe(int(sample["window"]))
            latent = sample["latent"] if self.encoder is None else self._encode(sample["rgb"])
            first, end = place["frames"]
            source = f"{place['episode']}, frames {first} to {end}"
            yield Clip(sample["rgb"], latent.float(), sample.get("flow"), source)

    @torch.no_grad()
    def _encode(self, rgb: Tensor) -> Tensor:
        """Encode uint8[T, 3, H, W] to the means of the posteriors, float[T, c, h, w] on the CPU."""
        assert self.encoder is not None
        network = self.encoder.network
        parts = rgb.to(self.device).split(DECODED_TOGETHER)
        return torch.cat([network.encode(to_float(part)).mean.float().cpu() for part in parts])
