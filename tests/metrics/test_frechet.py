import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor

from owl.metrics.frechet import FEATURES, FrechetDistance, frechet_distance
from owl.nn.frozen import trained
from tests.helpers.errors import refused


def samples(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + seed


def textbook(x: Tensor, y: Tensor) -> float:
    a, b = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root.real))


@pytest.mark.parametrize("counts", [(40, 60), (40, 6), (5, 7), (10, 9)])
def test_equals_the_matrix_square_root(counts):
    x, y = samples(counts[0], 10, 1), samples(counts[1], 10, 2)
    assert frechet_distance(x, y).item() == pytest.approx(textbook(x, y), rel=1e-4)


@pytest.mark.parametrize("count", [4, 30])
def test_distance_to_itself_is_zero(count):
    x = samples(count, 10, 3)
    assert abs(frechet_distance(x, x).item()) < 1e-10 * x.square().sum().item()


def test_closed_form_for_gaussians():
    # Exactly white samples: the 2d points +-sqrt(d - 1/2) e_i have mean 0 and unbiased covariance 1.
    width = 6
    white = (width - 0.5) ** 0.5 * torch.cat([torch.eye(width), -torch.eye(width)]).double()
    shift, scale = torch.arange(width).double(), torch.linspace(0.5, 3, width).double()
    expected = shift.square().sum() + (scale - 1).square().sum()
    assert frechet_distance(white, white * scale + shift).item() == pytest.approx(expected.item())


def test_one_image_is_too_few():
    with refused("frechet.too-few", "1 real", "4 generated", "2"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(4, 3))


@pytest.fixture(scope="module")
def metric() -> FrechetDistance:
    return FrechetDistance()


def images(count: int) -> Tensor:
    coarse = torch.rand(count, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=(48, 80), mode="bilinear")


def test_grows_with_blur_and_is_zero_for_equal_images(metric):
    real = images(6)
    noisy = (real + 0.1 * torch.randn(real.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    distances = []
    for generated in (real, real.lerp(noisy, 0.3), noisy):
        metric.reset()
        metric.update(real[:4], generated[:4])
        metric.update(real[4:], generated[4:])
        distances.append(metric.compute().item())
    assert distances[0] == pytest.approx(0, abs=1e-4)
    assert distances[0] < distances[1] < distances[2]


def test_features_are_pinned(metric):
    # Values of the package's own network, loaded by its own code, on (image * 255 - 127) / 128 at 224x224.
    features = metric.features(images(1))
    assert features.shape == (1, FEATURES)
    expected = [0.0, 0.0, 0.0135532, 0.1222723, 0.0, 0.2427424, 0.0, 0.1089257]
    assert features[0, :8].tolist() == pytest.approx(expected, abs=1e-4)


def test_nothing_to_train_or_save(metric):
    assert not trained(metric)
    assert not metric.state_dict()
    metric.train()
    assert not any(part.training for part in metric.features.modules())


def test_building_leaves_the_random_state_alone_and_does_not_depend_on_inference_mode():
    before = torch.get_rng_state()
    with torch.inference_mode():
        features = FrechetDistance().features
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(tensor.is_inference() for tensor in (*features.parameters(), *features.buffers()))
