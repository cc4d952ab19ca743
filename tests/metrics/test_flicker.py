"""Flicker: nothing for the truth, twice the variance of independent noise, less than nothing for blur."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from owl.metrics.flicker import Flicker
from tests.helpers.errors import refused


def moving(clips: int = 2) -> Tensor:
    """float[clips, 6, 3, 32, 48] in [0, 1]: a texture that slides by a pixel a frame."""
    texture = torch.rand(clips, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    return torch.stack([texture.roll(shift, -1) for shift in range(6)], 1)


def measured(generated: Tensor, true: Tensor) -> tuple[float, float]:
    metric = Flicker()
    metric.update(generated, true)
    values = metric.compute()
    return float(values["flicker"]), float(values["flicker_true"])


def test_the_truth_does_not_flicker_however_it_moves() -> None:
    excess, true = measured(moving(), moving())
    assert excess == 0
    assert true > 0.01


def test_independent_noise_adds_twice_its_variance() -> None:
    still = torch.full((2, 20, 3, 32, 48), 0.5)
    noise = 0.1 * torch.randn(still.shape, generator=torch.Generator().manual_seed(1))
    excess, true = measured(still + noise, still)
    assert true == 0
    assert excess == pytest.approx(2 * 0.1**2, rel=0.01)


def test_noise_that_stays_and_light_that_changes_are_no_flicker() -> None:
    still = torch.full((1, 5, 3, 32, 48), 0.5)
    grain = 0.1 * torch.randn(1, 1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    light = torch.linspace(0, 0.3, 5)[:, None, None, None]
    assert measured(still + grain, still)[0] == pytest.approx(0, abs=1e-12)
    assert measured(still + light, still)[0] == pytest.approx(0, abs=1e-12)


def test_blur_changes_less_than_the_truth() -> None:
    true = moving()
    blurred = F.avg_pool2d(true.flatten(0, 1), 3, 1, 1).view(true.shape)
    assert measured(blurred, true)[0] < 0


def test_is_the_mean_of_the_clips_whatever_the_batches() -> None:
    true = moving(3)
    generated = true + 0.1 * torch.randn(true.shape, generator=torch.Generator().manual_seed(1))
    metric = Flicker()
    metric.update(generated[:2], true[:2])
    metric.update(generated[2:], true[2:])
    assert float(metric.compute()["flicker"]) == pytest.approx(measured(generated, true)[0], rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 3, 8, 8), (2, 3, 3, 8, 10), (3, 3, 8, 8)])
def test_what_cannot_be_compared_is_refused(shape: tuple[int, ...]) -> None:
    with refused("flicker.shape", str(list(shape))):
        Flicker().update(torch.zeros(shape), torch.zeros(2, 3, 3, 8, 8) if shape[1] > 1 else torch.zeros(shape))
