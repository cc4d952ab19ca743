"""Symmetric logarithm, which compresses movements from one unit to hundreds (DreamerV3, Hafner et al. 2023, eq. 9)."""

import torch
from torch import Tensor


def symlog(x: Tensor) -> Tensor:
    """Compute sign(x) ln(1 + |x|): approximately linear near 0, logarithmic for large values."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """Compute the inverse of `symlog`."""
    return x.sign() * torch.expm1(x.abs())
