"""Feature matching: decoded sound causes the same hidden activations in a discriminator as the original."""

from collections.abc import Sequence

import torch
from torch import Tensor

from owl.errors import OwlError

SMALLEST_MEAN = 1e-3
"""Added to the mean magnitude of a layer, as in stable-audio-tools."""


def feature_matching(fake: Sequence[Sequence[Tensor]], real: Sequence[Sequence[Tensor]]) -> Tensor:
    """Compute the relative distance of the features of K networks with L layers each.

    Défossez et al. 2022, "High Fidelity Neural Audio Compression", equation 2:
    1 / (K L) sum over k, l of mean |D_kl(x) - D_kl(G)| / mean |D_kl(x)|.

    Args:
        fake: Features of decoded sound, K lists of L tensors.
        real: Those of the original, of the same shapes; no gradient reaches them.

    Returns:
        A scalar.

    Raises:
        OwlError: The shapes differ.
    """
    networks = []
    for found, wanted in zip(fake, real, strict=True):
        for a, b in zip(found, wanted, strict=True):
            if a.shape != b.shape:
                raise OwlError(
                    "adversarial.shape",
                    f"feature matching got layers of {list(a.shape)} and {list(b.shape)}, expected equal shapes; give "
                    "the discriminator as much decoded sound as original",
                )
        distances = [_distance(a, b.detach()) for a, b in zip(found, wanted, strict=True)]
        networks.append(torch.stack(distances).mean())
    return torch.stack(networks).mean()


def _distance(fake: Tensor, real: Tensor) -> Tensor:
    precision = torch.promote_types(fake.dtype, torch.float32)
    fake, real = fake.to(precision), real.to(precision)
    return (fake - real).abs().mean() / (real.abs().mean() + SMALLEST_MEAN)
