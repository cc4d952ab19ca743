"""Interface of the bottleneck between encoder and decoder: latents and loss terms."""

from typing import Protocol

import torch
from torch import Tensor


class Encoding(Protocol):
    """Return type of an autoencoder's ``encode`` for any bottleneck: a Gaussian, a quantiser, or none.

    The loss terms of the bottleneck are methods without arguments that return a scalar. The network names them in its
    attribute ``losses``, a tuple of strings: recipes weight and log them, and validation measures them.
    """

    @property
    def mean(self) -> Tensor:
        """Latents without noise, float[B, c, h, w], on which later stages are trained."""

    @property
    def variance(self) -> Tensor:
        """Variance of the noise that `sample` adds, broadcastable to the latents; zero if it adds none."""

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return the latents for training the decoder, float[B, c, h, w], with gradients to the encoder."""
