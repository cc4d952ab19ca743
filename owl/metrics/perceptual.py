"""LPIPS as a metric."""

import torch
from torch import Tensor
from torchmetrics import Metric

from owl.losses.lpips import LPIPS


class PerceptualDistance(Metric):
    """Mean LPIPS over images, always in float32.

    Args:
        lpips: The distance; can be shared with the loss, since it has no state.

    Attributes:
        name: Name of the distance, e.g. ``lpips_st_alex``.
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, lpips: LPIPS) -> None:
        super().__init__()
        self.lpips = lpips
        self.name = lpips.name
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, reconstruction: Tensor, image: Tensor) -> None:
        """Add pairs of images, float[B, 3, H, W] in [-1, 1]."""
        with torch.autocast(image.device.type, enabled=False):
            distance = self.lpips(reconstruction.float(), image.float())
        self.total += distance.sum()
        self.count += len(distance)

    def compute(self) -> Tensor:
        """Compute the mean over all pairs, float[]."""
        return self.total / self.count
