"""Metrics of several decoders on the same frames."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.image import StructuralSimilarityIndexMeasure

from owl.losses.lpips import LPIPS
from owl.metrics.flicker import FlickerAlongFlow
from owl.metrics.frechet import EfficientNetLite0Features, FrechetDistance, frechet_distance
from owl.metrics.perceptual import PerceptualDistance
from owl.metrics.psnr import MeanPSNR, psnr_of

FLICKER = "flicker"


class ComparisonMetrics:
    """PSNR, SSIM, LPIPS, the Frechet distance and, where flow is known, the flicker along it, of several decoders.

    The same values as `owl.recipes.decoders.DecoderMetrics` for each, but features of true frames are computed once.

    Args:
        names: Of the decoders.
        lpips: The perceptual distance.
    """

    def __init__(self, names: list[str], lpips: LPIPS) -> None:
        device = lpips.shift.device
        self.features = EfficientNetLite0Features().to(device)
        self.true: list[Tensor] = []
        self.decoded: dict[str, list[Tensor]] = {name: [] for name in names}
        self.metrics: dict[str, dict[str, Metric]] = {
            name: {
                "psnr": MeanPSNR().to(device),
                "ssim": StructuralSimilarityIndexMeasure(data_range=1.0).to(device),
                lpips.name: PerceptualDistance(lpips),
                FLICKER: FlickerAlongFlow().to(device),
            }
            for name in names
        }
        self.lpips = lpips

    @torch.no_grad()
    def update(self, decoded: dict[str, Tensor], true: Tensor, flow: Tensor | None = None) -> None:
        """Add a clip.

        Args:
            decoded: By decoder, float[T, 3, H, W] in [-1, 1].
            true: float[T, 3, H, W] in [-1, 1].
            flow: float[T, 2, h, w], see `owl.metrics.flicker.FlickerAlongFlow`.
        """
        original = (true + 1) / 2
        self.true.append(self.features(original))
        for name, images in decoded.items():
            shown, metrics = (images + 1) / 2, self.metrics[name]
            self.decoded[name].append(self.features(shown))
            metrics["psnr"].update(shown, original)
            metrics["ssim"].update(shown, original)
            metrics[self.lpips.name].update(images, true)
            if flow is not None and len(true) > 1:
                metrics[FLICKER].update(shown[None], original[None], flow[None])

    def compute(self) -> dict[str, dict[str, float]]:
        """Return the metrics of each decoder, by the names under which recipes log them."""
        true = torch.cat(self.true)
        return {
            name: {key: float(metric.compute()) for key, metric in metrics.items() if metric.update_called}
            | {FrechetDistance.name: float(frechet_distance(true, torch.cat(self.decoded[name])))}
            for name, metrics in self.metrics.items()
        }


@torch.no_grad()
def quality(decoded: Tensor, true: Tensor, lpips: LPIPS) -> tuple[float, float]:
    """Return PSNR in dB and LPIPS of one clip, means over its frames; both are float[T, 3, H, W] in [-1, 1]."""
    error = ((decoded - true) / 2).square().mean((1, 2, 3))
    return float(psnr_of(error).mean()), float(lpips(decoded, true).mean())
