import math

import pytest
import torch

from owl.metrics.latents import LatentStatistics
from owl.nn.posterior import Posterior


def posterior(count: int, seed: int = 0, scale: tuple[float, ...] = (1.0, 2.0, 0.5), logvar: float = -9.0) -> Posterior:
    noise = torch.randn(count, len(scale), 3, 4, generator=torch.Generator().manual_seed(seed))
    offset = torch.arange(len(scale)).view(1, -1, 1, 1)
    return Posterior(noise * torch.tensor(scale).view(1, -1, 1, 1) + offset, torch.full((count, 1, 3, 4), logvar))


def test_batches_of_any_size_equal_all_at_once():
    whole = posterior(7)
    metric = LatentStatistics(3)
    for part in (slice(0, 1), slice(1, 4), slice(4, 7)):
        metric.update(Posterior(whole.mean[part], whole.logvar[part]))
    values = metric.compute()
    torch.testing.assert_close(values["mean"], whole.mean.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(values["std"], whole.mean.std(dim=(0, 2, 3), correction=0))
    torch.testing.assert_close(values["overall_mean"], whole.mean.mean())
    torch.testing.assert_close(values["overall_std"], whole.mean.std(correction=0))
    torch.testing.assert_close(values["kl"], whole.kl())
    assert values["dead_channels"] == 0


def test_survives_a_large_offset():
    # Sums of squares in float32 would say that the standard deviation is 0 or not a number.
    latents = posterior(8)
    metric = LatentStatistics(3)
    metric.update(Posterior(latents.mean + 3000, latents.logvar))
    torch.testing.assert_close(
        metric.compute()["std"], latents.mean.std(dim=(0, 2, 3), correction=0), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(
    ("scale", "logvar", "dead"),
    [
        ((1.0, 2.0, 0.5), -9.0, 0),
        ((1.0, 2.0, 0.0), -9.0, 1),  # constant
        ((1.0, 2.0, 0.01), -20.0, 1),  # beside channels 200 times as varied
        ((1.0, 2.0, 0.05), 0.0, 1),  # drowned in the noise of the posterior
        ((0.01, 0.02, 0.005), -20.0, 0),  # small, but all alike and above the noise
    ],
)
def test_dead_channels(scale, logvar, dead):
    metric = LatentStatistics(3)
    metric.update(posterior(20, scale=scale, logvar=logvar))
    assert metric.compute()["dead_channels"] == dead


def test_kl_of_the_prior_is_zero_and_of_a_shift_is_half_its_square():
    metric = LatentStatistics(2)
    metric.update(Posterior(torch.full((2, 2, 3, 3), 2.0), torch.full((2, 1, 3, 3), math.log(1.0))))
    metric.update(Posterior(torch.zeros(2, 2, 3, 3), torch.zeros(2, 1, 3, 3)))
    assert metric.compute()["kl"].item() == pytest.approx(1.0)
