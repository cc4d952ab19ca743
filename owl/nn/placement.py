"""Where a network lives."""

from typing import NamedTuple

import torch
from torch import nn


class Placement(NamedTuple):
    """Device of a network, and the dtype that it computes in."""

    device: torch.device
    dtype: torch.dtype


def placement(network: nn.Module) -> Placement:
    """Tell the device and dtype of a network.

    Returns:
        Those of its largest floating-point tensor: small buffers, such as statistics, may be kept in another dtype. The
        CPU and torch's default dtype where it has none.
    """
    tensors = (*network.parameters(), *network.buffers())
    largest = max((x for x in tensors if x.is_floating_point()), key=lambda x: x.numel(), default=None)
    if largest is None:
        return Placement(torch.device("cpu"), torch.get_default_dtype())
    return Placement(largest.device, largest.dtype)
