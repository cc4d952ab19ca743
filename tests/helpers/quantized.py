"""An image autoencoder with another bottleneck than a Gaussian, in one file: finite scalar quantisation."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from owl.models.image_autoencoder import ImageAutoencoder

LEVELS = 7
"""Values that a channel of the latent may have, evenly spaced in [-1, 1]."""


@dataclass(frozen=True)
class Codes:
    """What Mentzer et al. 2023, "Finite Scalar Quantization", make of an encoder's output.

    Attributes:
        bounded: float[B, c, h, w] in [-1, 1], before rounding.
    """

    bounded: Tensor

    @property
    def mean(self) -> Tensor:
        """The rounded latents, with the gradient of those before rounding."""
        rounded = (self.bounded * (LEVELS // 2)).round() / (LEVELS // 2)
        return rounded.detach() + (self.bounded - self.bounded.detach())

    @property
    def variance(self) -> Tensor:
        """No noise."""
        return self.bounded.new_zeros(())

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """The rounded latents."""
        return self.mean

    def commitment(self) -> Tensor:
        """How far the encoder is from its codes."""
        return (self.bounded - self.mean.detach()).square().mean()


class QuantizedAutoencoder(ImageAutoencoder):
    """Takes what `ImageAutoencoder` takes."""

    losses: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.encoder.logvar.requires_grad_(False)

    def encode(self, image: Tensor) -> Codes:  # type: ignore[override]
        """The codes of float[B, 3, H, W] in [-1, 1]."""
        return Codes(self.encoder(image)[0].tanh())
