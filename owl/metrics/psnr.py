"""Peak signal-to-noise ratio, averaged over images."""

import torch
from torch import Tensor
from torchmetrics import Metric

HIGHEST = 100.0  # dB: value of a perfect image, which is infinite by definition


def psnr_of(error: Tensor) -> Tensor:
    """Convert mean squared errors of values in [0, 1] to the PSNR in dB, at most 100."""
    return (-10 * error.log10()).clamp(max=HIGHEST)


class MeanPSNR(Metric):
    """Mean over images of 10 log10(1 / MSE), in dB, for images in [0, 1].

    ``torchmetrics.image.PeakSignalNoiseRatio`` with ``dim`` computes the same, but hangs or crashes if a rank has no
    images (its empty state has another type), and one perfect image makes its mean infinite.
    """

    is_differentiable = True
    higher_is_better = True
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, reconstruction: Tensor, image: Tensor) -> None:
        """Add pairs of images, float[B, C, H, W] in [0, 1]."""
        error = (reconstruction.float() - image.float()).square().mean(dim=(1, 2, 3))
        self.total += psnr_of(error).sum()
        self.count += len(error)

    def compute(self) -> Tensor:
        """Compute the mean over all images, float[] in dB."""
        return self.total / self.count
