"""Distribution matching distillation (DMD): the student is moved from what it generates to what its teacher would.

Yin et al. 2024, "Improved Distribution Matching Distillation for Fast Image Synthesis" (DMD2), as used for rollouts by
Huang et al. 2025, "Self Forcing". With a generated sample x, noised to x_t, and the predictions of its x0 by the frozen
teacher, x_real, and by a critic that is trained on generated samples, x_fake:

    g = (x_fake - x_real) / mean |x - x_real|
    L = 1/2 mean (x - sg(x - g))^2,    dL/dx = g / numel(x)
"""

import torch
from torch import Tensor

EPSILON = 1e-6
"""Keeps the normaliser above zero, for a sample that the teacher predicts exactly."""


@torch.no_grad()
def dmd_gradient(clean: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Compute g. Each sample is normalised on its own, and each stream of latents by a call of its own.

    Args:
        clean: float[B, ...], x.
        real: The same shape, x_real: the teacher's x0, with guidance if there is any.
        fake: The same shape, x_fake: the critic's x0.

    Returns:
        Like ``clean``.
    """
    return (fake - real) / normaliser(clean, real)


@torch.no_grad()
def normaliser(clean: Tensor, real: Tensor) -> Tensor:
    """Compute mean |x - x_real| of each sample, float[B, 1, ...], for arguments of `dmd_gradient`."""
    size = (clean - real).abs().flatten(1).mean(1) + EPSILON
    return size.view(-1, *[1] * (clean.ndim - 1))


def dmd_loss(clean: Tensor, gradient: Tensor) -> Tensor:
    """Compute L: half the mean square of g, with the gradient g / numel towards x.

    Args:
        clean: float[...], x; any part of the samples.
        gradient: The same shape, g.

    Returns:
        float[].
    """
    return (clean - (clean - gradient).detach()).square().mean() / 2
