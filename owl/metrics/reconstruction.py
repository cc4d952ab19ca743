"""Metrics of reconstructions that are reported together."""

from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image import StructuralSimilarityIndexMeasure

from owl.losses.lpips import LPIPS
from owl.metrics.frechet import FrechetDistance
from owl.metrics.perceptual import PerceptualDistance
from owl.metrics.psnr import MeanPSNR


class ReconstructionMetrics(nn.Module):
    """PSNR, SSIM, LPIPS and the Fréchet distance of clipped reconstructions in float32.

    Args:
        lpips: The perceptual distance; can be shared with the loss.
    """

    def __init__(self, lpips: LPIPS) -> None:
        super().__init__()
        self.psnr = MeanPSNR()
        self.ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
        self.perceptual = PerceptualDistance(lpips)
        self.frechet = FrechetDistance()

    def update(self, reconstruction: Tensor, image: Tensor) -> None:
        """Add reconstructions, float[B, 3, H, W], and their images, of the same shape in [-1, 1]."""
        reconstruction = reconstruction.float().clamp(-1, 1)
        original, shown = (image + 1) / 2, (reconstruction + 1) / 2
        self.psnr.update(shown, original)
        self.ssim.update(shown, original)
        self.perceptual.update(reconstruction, image)
        self.frechet.update(original, shown)

    def named(self, split: str) -> dict[str, Metric]:
        """Return each metric by its name in logs, such as ``val/psnr``."""
        names = {"psnr": self.psnr, "ssim": self.ssim}
        names |= {self.perceptual.name: self.perceptual, self.frechet.name: self.frechet}
        return {f"{split}/{name}": metric for name, metric in names.items()}
