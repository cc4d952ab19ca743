"""Equivariance of a latent space under scaling and rotation, as a regulariser of the decoder.

Kouzelis et al. 2025, "EQ-VAE: Equivariance Regularized Latent Space for Improved Generative Image Modeling", eq. 4:
instead of x from z, reconstruct t(x) from t(z) under the whole loss, with a random transform t. In a training step:

    posterior = network.encode(image)
    draw = draw_transform(network.latent_size)
    loss = reconstruction_loss(network.decode(transform(posterior.sample(), draw)), transform(image, draw))

One draw per step, shared by all terms of the loss and by the whole batch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Transform:
    """Scaling followed by rotation; the default leaves everything as it is."""

    scale: tuple[float, float] = (1.0, 1.0)
    """Factors of height and width, each a ratio of whole latent sizes."""
    quarter_turns: int = 0
    """Counter-clockwise rotations by 90 degrees; an odd number swaps height and width."""


def draw_transform(
    latent_size: tuple[int, int],
    probability: float = 0.5,
    fixed_size: bool = False,
    generator: torch.Generator | None = None,
) -> Transform:
    """Draw the transform of one training step.

    Args:
        latent_size: (h, w). Scales are rounded to whole latent sizes, so that a decoder with a whole upsampling
            factor answers with exactly the size of the transformed image.
        probability: Of transforming at all; otherwise the plain reconstruction is trained.
        fixed_size: For networks that take one input size only, such as those with learned landscape-to-square
            ends: the transform is then a rotation by 180 degrees, which is all that keeps the size.
        generator: On the CPU.

    Returns:
        With the given probability, scale in {8..31}/32 and 1, 2 or 3 quarter turns.
    """
    chance = torch.rand((), generator=generator).item()
    scale = torch.randint(8, 32, (), generator=generator).item() / 32
    quarter_turns = int(torch.randint(1, 4, (), generator=generator).item())
    if chance >= probability:
        return Transform()
    if fixed_size:
        return Transform(quarter_turns=2)
    height, width = latent_size
    return Transform((max(1, round(scale * height)) / height, max(1, round(scale * width)) / width), quarter_turns)


def transform(x: Tensor, drawn: Transform) -> Tensor:
    """Apply a drawn transform to latents or images, float[B, C, H, W]: bilinear scaling, then rotation."""
    size = (round(x.shape[-2] * drawn.scale[0]), round(x.shape[-1] * drawn.scale[1]))
    if size != x.shape[-2:]:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return torch.rot90(x, drawn.quarter_turns, dims=(-2, -1))
