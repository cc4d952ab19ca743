"""Errors of depth and optical flow, each a mean over all measured pixels."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

DELTA = 1.25


class DepthMetrics(nn.Module):
    """Absolute relative error and threshold accuracy of distances (Eigen et al. 2014, section 4).

    AbsRel is the mean of |d' - d| / d, delta < 1.25 the share of pixels with max(d' / d, d / d') < 1.25. Pixels without
    a measurement do not count; without any, both are NaN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.abs_rel, self.delta = _mean(), _mean()

    def update(self, found: Tensor, true: Tensor, known: Tensor) -> None:
        """Add predicted and true distances, both float in one shape, and whether each pixel was measured, bool."""
        found, true = found[known].float(), true[known].float()
        if found.numel():
            ratio = found / true
            self.abs_rel.update((ratio - 1).abs())
            self.delta.update((ratio.maximum(1 / ratio) < DELTA).float())

    def named(self) -> dict[str, Metric]:
        """Return each metric by its name."""
        return {"depth_abs_rel": self.abs_rel, "depth_delta": self.delta}


class FlowMetrics(nn.Module):
    """Mean end-point error in pixels, and that of predicting no motion, as a reference."""

    def __init__(self) -> None:
        super().__init__()
        self.error, self.of_zero = _mean(), _mean()

    def update(self, found: Tensor, true: Tensor) -> None:
        """Add flow fields.

        Args:
            found: float[B, 2, H, W], pixels; averaged to the grid of the true flow.
            true: float[B, 2, h, w]; where it is not finite, it does not count.
        """
        found = F.adaptive_avg_pool2d(found.float(), (true.shape[-2], true.shape[-1]))
        known = true.isfinite().all(1)
        if known.any():
            self.error.update((found - true).norm(dim=1)[known])
            self.of_zero.update(true.norm(dim=1)[known])

    def named(self) -> dict[str, Metric]:
        """Return each metric by its name."""
        return {"flow_epe": self.error, "flow_epe_of_zero": self.of_zero}


def _mean() -> MeanMetric:
    return MeanMetric(nan_strategy="disable")  # the other strategies look at every value
