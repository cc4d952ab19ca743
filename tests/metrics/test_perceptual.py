import pytest
import torch

from owl.losses.lpips import LPIPS
from owl.metrics.perceptual import PerceptualDistance


@pytest.fixture(scope="module")
def metric() -> PerceptualDistance:
    return PerceptualDistance(LPIPS())


def images(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_is_the_mean_over_images_not_over_batches(metric):
    x, y = images(3, 0), images(3, 1)
    metric.reset()
    metric.update(x[:1], y[:1])
    metric.update(x[1:], x[1:])
    assert metric.compute().item() == pytest.approx(metric.lpips(x, y)[0].item() / 3, rel=1e-5)
    assert metric.name == "lpips_st_alex"


def test_does_not_lose_precision_under_autocast(metric):
    x = images(2, 0)
    y = x + 0.01 * images(2, 1)
    metric.reset()
    with torch.autocast("cpu", torch.bfloat16):
        metric.update(x, y)
    assert metric.compute().item() == pytest.approx(metric.lpips(x, y).mean().item(), rel=1e-5)
    assert not metric.state_dict()
