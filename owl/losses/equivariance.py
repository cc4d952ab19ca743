"""Equivariance of a latent space under scaling and rotation, as a regulariser.

Kouzelis et al. 2025, "EQ-VAE: Equivariance Regularized Latent Space for Improved Generative Image Modeling", eq. 4:
instead of x from z, reconstruct t(x) from t(z) with the full loss, for a random transform t. In a training step:

    latent = network.encode(image).sample()
    transform = draw(image, latent)
    loss = reconstruction_loss(network.decode(transform(latent)), transform(image))

One draw per step, shared by all terms of the loss and by the whole batch.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from owl.errors import OwlError


@dataclass(frozen=True)
class Transform:
    """Scaling followed by rotation, for latents and images; the default is the identity."""

    scale: tuple[float, float] = (1.0, 1.0)
    """Factors of height and width, each a ratio of whole latent sizes."""
    quarter_turns: int = 0
    """Counter-clockwise rotations by 90 degrees; an odd number swaps height and width."""

    def __call__(self, x: Tensor) -> Tensor:
        """Scale (bilinear) and rotate float[B, C, H, W]."""
        size = (round(x.shape[-2] * self.scale[0]), round(x.shape[-1] * self.scale[1]))
        if size != x.shape[-2:]:
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return torch.rot90(x, self.quarter_turns, dims=(-2, -1))


def draw(
    image: Tensor,
    latent: Tensor,
    fixed_size: bool = False,
    smallest: int = 1,
    generator: torch.Generator | None = None,
) -> Transform:
    """Draw the transform of one training step.

    Args:
        image: float[B, C, H, W].
        latent: float[B, c, h, w]. Scales are rounded to integer latent sizes, so that the decoder's output has exactly
            the size of the transformed image.
        fixed_size: For networks with a fixed input size, such as those with learned landscape-to-square layers: use a
            rotation by 180 degrees, the only transform that preserves the size.
        smallest: Minimum side of the transformed image in pixels; LPIPS needs 32.
        generator: Generator on the CPU.

    Returns:
        Scale in {8..31}/32 with 1, 2 or 3 quarter turns; EQ-VAE uses it in half of the steps.

    Raises:
        OwlError: The ratio of image size to latent size is not the same integer in both directions.
    """
    scale = torch.randint(8, 32, (), generator=generator).item() / 32
    quarter_turns = int(torch.randint(1, 4, (), generator=generator).item())
    if fixed_size:
        return Transform(quarter_turns=2)
    scale = min(1.0, max(scale, smallest / min(image.shape[-2:])))
    height, width = latent.shape[-2:]
    factor = image.shape[-2] // height
    if tuple(image.shape[-2:]) != (factor * height, factor * width):
        raise OwlError(
            "equivariance.factor",
            f"equivariance got latents of {height}x{width} for images of {image.shape[-2]}x{image.shape[-1]}, expected "
            "the same integer factor in both directions; use fixed_size, or weight 0",
        )
    # rounded up, so that the sides are not shorter than `smallest`
    return Transform((math.ceil(scale * height) / height, math.ceil(scale * width) / width), quarter_turns)
