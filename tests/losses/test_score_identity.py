"""Score identity distillation: its value by hand, what vanishes, and where its gradient goes."""

import pytest
import torch

from owl.losses.distribution_matching import dmd_gradient
from owl.losses.score_identity import sid_loss


def test_the_value_and_the_gradients_by_hand() -> None:
    x, real, fake = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    loss = sid_loss(x, real, fake, 1.2)
    size = (x - real).abs().mean((1, 2), keepdim=True).detach()
    # the paper's form: (1 - alpha) |x_real - x_fake|^2 + (x_real - x_fake) (x_fake - x)
    expected = ((1 - 1.2) * (real - fake) ** 2 + (real - fake) * (fake - x)) / size
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-5, atol=1e-9)
    found = torch.autograd.grad(loss, (x, real, fake))
    count = x.numel()
    by_hand = (
        -(real - fake) / size / count,
        ((2 - 2 * 1.2) * (real - fake) + fake - x) / size / count,
        (-2 * (1 - 1.2) * (real - fake) + real - 2 * fake + x) / size / count,
    )
    for slope, other in zip(found, by_hand, strict=True):
        torch.testing.assert_close(slope, other, rtol=1e-5, atol=1e-9)


def test_its_direct_gradient_is_that_of_distribution_matching() -> None:
    x, real, fake = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(3))
    (slope,) = torch.autograd.grad(sid_loss(x.requires_grad_(), real, fake, 1.0), x)
    torch.testing.assert_close(slope, dmd_gradient(x, real, fake) / x.numel())


def test_equal_predictions_give_no_loss_and_samples_are_normalised_on_their_own() -> None:
    x, real, fake = (torch.randn(2, 3, 4) for _ in range(3))
    assert sid_loss(x, real, real, 1.0) == 0
    one, other = (sid_loss(*(part[i : i + 1] for part in (x, real, fake)), 1.0) for i in (0, 1))
    assert sid_loss(x, real, fake, 1.0) == pytest.approx(float(one + other) / 2, rel=1e-5)
