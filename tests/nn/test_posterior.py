"""The Gaussian posterior against torch.distributions."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from owl.nn.posterior import Posterior


def random_posterior() -> Posterior:
    torch.manual_seed(0)
    return Posterior(torch.randn(3, 4, 5, 6), torch.randn(3, 1, 5, 6))


def test_kl_is_the_mean_over_elements_of_the_closed_form() -> None:
    posterior = random_posterior()
    normal = Normal(posterior.mean, (0.5 * posterior.logvar).exp().expand_as(posterior.mean))
    expected = kl_divergence(normal, Normal(0.0, 1.0)).mean()
    assert torch.allclose(posterior.kl(), expected, atol=1e-6)


def test_kl_of_the_standard_normal_is_zero_also_in_bfloat16() -> None:
    posterior = Posterior(torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16))
    assert float(posterior.kl()) == 0
    assert posterior.kl().dtype == torch.float32


def test_samples_have_the_mean_and_the_shared_variance() -> None:
    posterior = Posterior(torch.full((1, 2, 1, 1), 3.0), torch.full((1, 1, 1, 1), -2.0))
    wide = Posterior(posterior.mean.expand(20_000, -1, -1, -1), posterior.logvar.expand(20_000, -1, -1, -1))
    sample = wide.sample(torch.Generator().manual_seed(0))
    assert float(sample.mean()) == pytest.approx(3.0, abs=0.02)
    assert float(sample.std()) == pytest.approx(torch.exp(torch.tensor(-1.0)).item(), rel=0.02)
    assert abs(float(torch.corrcoef(sample.flatten(1).T)[0, 1])) < 0.02  # channels share the variance, not the noise


def test_sampling_follows_the_generator_and_passes_gradients_to_both_parts() -> None:
    mean, logvar = torch.randn(1, 4, 2, 2).requires_grad_(), torch.randn(1, 1, 2, 2).requires_grad_()
    posterior = Posterior(mean, logvar)
    first = posterior.sample(torch.Generator().manual_seed(1))
    assert torch.equal(first, posterior.sample(torch.Generator().manual_seed(1)))
    first.square().sum().backward()
    assert mean.grad is not None
    assert logvar.grad is not None
    assert bool((logvar.grad != 0).any())
