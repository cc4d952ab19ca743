import pytest
import torch
from torchmetrics.image import PeakSignalNoiseRatio

from owl.metrics.psnr import MeanPSNR


def test_is_the_mean_of_the_images_whatever_the_batches():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(5, 3, 8, 8, generator=generator)
    noise = torch.linspace(0.01, 0.4, 5).view(5, 1, 1, 1) * torch.randn(image.shape, generator=generator)
    metric, reference = MeanPSNR(), PeakSignalNoiseRatio(1.0, reduction="elementwise_mean", dim=(1, 2, 3))
    for part in (slice(0, 4), slice(4, 5)):
        metric.update((image + noise)[part], image[part])
        reference.update((image + noise)[part], image[part])
    assert metric.compute().item() == pytest.approx(reference.compute().item(), rel=1e-5)


def test_closed_form_and_perfect_images():
    metric = MeanPSNR()
    flat = torch.full((1, 3, 4, 4), 0.5)
    metric.update(flat + 0.1, flat)
    assert metric.compute().item() == pytest.approx(20.0, abs=1e-4)
    metric.update(flat, flat)
    assert metric.compute().item() == pytest.approx(60.0, abs=1e-4)
