"""The causal prior of latents: it sees no future, and distinguishes predictable sequences from others."""

import torch

from owl.nn.prior import CausalPrior
from tests.helpers.errors import refused


def test_a_prediction_does_not_see_what_it_predicts() -> None:
    prior = CausalPrior(3).double().eval()
    latent = torch.randn(2, 3, 8).double()
    changed = latent.clone()
    changed[..., 5:] += 1
    before, after = prior(latent), prior(changed)
    torch.testing.assert_close(before[..., :5], after[..., :5], rtol=0, atol=1e-12)
    assert (before[..., 5:] - after[..., 5:]).abs().min() > 0


def test_the_relative_error_does_not_fall_when_latents_shrink() -> None:
    prior = CausalPrior(3)
    for parameter in prior.last.parameters():
        torch.nn.init.zeros_(parameter)  # predicts the mean
    latent = torch.randn(4, 3, 16)
    error, relative = prior.error(latent)
    smaller, relative_smaller = prior.error(latent * 0.01)
    torch.testing.assert_close(smaller, error * 1e-4)
    torch.testing.assert_close(relative_smaller, relative)
    with refused("network.input", "1", "2", "prior"):
        prior.error(latent[..., :1])


def test_it_learns_a_sequence_and_the_encoder_gets_its_gradient() -> None:
    prior = CausalPrior(2)
    latent = torch.stack([torch.sin(torch.arange(20) * 0.5), torch.cos(torch.arange(20) * 0.5)])[None].requires_grad_()
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    first = prior.error(latent)[0].item()
    for _ in range(30):
        optimizer.zero_grad()
        prior.error(latent)[0].backward()
        optimizer.step()
    assert prior.error(latent)[0].item() < first / 5
    assert latent.grad is not None
    assert bool(latent.grad[..., 0].any())
    assert bool(latent.grad[..., -1].any())
