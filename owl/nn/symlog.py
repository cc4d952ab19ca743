"""A scale on which movements of one unit and of hundreds are alike (DreamerV3, Hafner et al. 2023, eq. 9)."""

import torch
from torch import Tensor


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|): about linear near 0, logarithmic far from it."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """The inverse of `symlog`."""
    return x.sign() * torch.expm1(x.abs())
