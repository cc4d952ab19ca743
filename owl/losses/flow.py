"""Rectified flow (Liu et al. 2022; Lipman et al. 2022), with the convention of the whole project:

x_t = (1 - t) x0 + t eps,    v = dx_t/dt = eps - x0,    x0 = x_t - t v,    eps = x_t + (1 - t) v.
"""

import torch
from torch import Tensor


def corrupt(clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """x_t.

    Args:
        clean: float[B, F, ...], x0.
        noise: The same shape, eps ~ N(0, 1).
        level: float[B, F], t in [0, 1].
    """
    t = level.reshape(*level.shape, *[1] * (clean.ndim - level.ndim))
    return (1 - t) * clean + t * noise


def logit_normal(normal: Tensor, mean: float, std: float) -> Tensor:
    """Noise levels sigmoid(N(mean, std)) in (0, 1) (Stable Diffusion 3, Esser et al. 2024, eq. 19).

    A higher mean trains more at high noise, where motion is decided; a lower one at low noise, where detail is.

    Args:
        normal: float[...], drawn from N(0, 1).
        mean: Of the logit.
        std: Of the logit.
    """
    return torch.sigmoid(mean + std * normal)


def velocity_loss(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity, for each frame: float[B, F]."""
    return (velocity.float() - (noise - clean).float()).square().flatten(2).mean(-1)
