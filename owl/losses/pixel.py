"""Element-wise reconstruction losses. All return the mean over all elements."""

import torch
from torch import Tensor


def l1(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Compute the mean absolute difference, float[]; images float[B, C, H, W] in [-1, 1]."""
    return (reconstruction - target).abs().mean()


def l2(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Compute the mean squared difference, float[]; images float[B, C, H, W] in [-1, 1]."""
    return (reconstruction - target).square().mean()


def logit_laplace(reconstruction: Tensor, target: Tensor, scale: float = 0.1) -> Tensor:
    """Compute the negative log-likelihood of the target under a logit-Laplace distribution around the reconstruction.

    Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", appendix A.3: images in [0, 1] are mapped to x' = 0.8 x +
    0.1, whose density is exp(-|logit x' - mu| / b) / (2 b x' (1 - x')). Here mu is the logit of the mapped
    reconstruction, so that networks output images as for the other losses, and b is a constant.

    Args:
        reconstruction: float[B, C, H, W], nominally in [-1, 1]. Beyond, the logit is continued by its tangent, so that
            larger values have a finite loss and a non-zero gradient.
        target: float[B, C, H, W] in [-1, 1].
        scale: b; the gradient grows as 1/b.

    Returns:
        Mean NLL in nats per element, float[]; can be negative, since it is a density.
    """
    x = 0.4 * target + 0.5
    negative_log_normaliser = torch.log(2 * scale * x * (1 - x))
    return (negative_log_normaliser + (torch.logit(x) - _squeezed_logit(reconstruction)).abs() / scale).mean()


def _squeezed_logit(image: Tensor) -> Tensor:
    inside = image.clamp(-1, 1)
    slope_at_the_ends = 0.4 / (0.1 * 0.9)  # d logit(0.4 r + 0.5) / dr at r = 1 and r = -1
    return torch.logit(0.4 * inside + 0.5) + slope_at_the_ends * (image - inside)
