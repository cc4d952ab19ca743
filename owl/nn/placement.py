"""Device and dtype of a network."""

from typing import NamedTuple

import torch
from torch import nn


class Placement(NamedTuple):
    """Device and computation dtype of a network."""

    device: torch.device
    dtype: torch.dtype


def placement(network: nn.Module) -> Placement:
    """Return the device and dtype of a network.

    Returns:
        Those of its largest floating-point tensor, since small buffers such as statistics can have another dtype; the
        CPU and torch's default dtype if it has none.
    """
    tensors = (*network.parameters(), *network.buffers())
    largest = max((x for x in tensors if x.is_floating_point()), key=lambda x: x.numel(), default=None)
    if largest is None:
        return Placement(torch.device("cpu"), torch.get_default_dtype())
    return Placement(largest.device, largest.dtype)
