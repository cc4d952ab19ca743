"""What stands between encoder and decoder: the latents, and what they cost."""

from typing import Protocol

import torch
from torch import Tensor


class Encoding(Protocol):
    """What an autoencoder's ``encode`` returns, whatever its bottleneck: a Gaussian, a quantiser, or none.

    The loss terms of the bottleneck are methods without arguments that return a scalar. The network names them in its
    attribute ``losses``, a tuple of strings: recipes weigh and log them, and validation measures them.
    """

    @property
    def mean(self) -> Tensor:
        """The latents without noise, float[B, c, h, w]: those that later stages are trained on."""

    @property
    def variance(self) -> Tensor:
        """That of the noise which `sample` adds, broadcastable to the latents; zero where it adds none."""

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """The latents that the decoder is trained on, float[B, c, h, w], with gradients to the encoder."""
