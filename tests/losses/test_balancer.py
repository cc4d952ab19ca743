"""The balancer: weights are shares of the gradient, whatever the scale of a loss; averages are those of Adam's kind."""

import pytest
import torch
from torch import Tensor

from owl.losses.balancer import GradientBalancer


def terms(output: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
    """Two losses with gradients in different directions."""
    return {"a": scale * output[..., :2].sum(1).mean(), "b": output[..., 2:].square().sum(1).mean()}


def output() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_weights_are_shares_of_the_gradient_whatever_the_scale_of_a_loss() -> None:
    x = output()
    found = [GradientBalancer(["b", "a"])(x, terms(x, scale), {"a": 1.0, "b": 3.0}) for scale in (1e-4, 1.0, 1e4)]
    for gradient in found:
        torch.testing.assert_close(gradient, found[1])
        assert float(gradient[:, :2].norm(dim=1).mean()) == pytest.approx(0.25, rel=1e-4)
        assert float(gradient[:, 2:].norm(dim=1).mean()) == pytest.approx(0.75, rel=1e-4)
    unbalanced = torch.autograd.grad(sum(terms(x).values()), x)[0]
    assert torch.nn.functional.cosine_similarity(found[1][:, 2:].flatten(), unbalanced[:, 2:].flatten(), 0) > 0.999


def test_norms_are_averaged_over_steps_with_bias_correction() -> None:
    balancer, x = GradientBalancer(["a"], decay=0.5, scale=2.0), output()
    for step, (scale, average) in enumerate([(1, 1), (4, 3), (0.5, 11 / 7)]):
        gradient = balancer(x, {"a": terms(x, scale)["a"]}, {"a": 1.0})
        # of the unscaled loss, |g| is sqrt(2) / 3 for each sample
        expected = 2.0 * scale / average / 2**0.5
        assert float(gradient[0, 0]) == pytest.approx(expected, rel=1e-5), step


def test_terms_without_weight_or_gradient_change_nothing_and_state_is_restored() -> None:
    x = output()
    balancer = GradientBalancer(["a", "b", "c"])
    given = terms(x) | {"c": 0 * x.sum()}
    gradient = balancer(x, given, {"a": 1.0, "b": 0.0, "c": 1.0})
    assert gradient.isfinite().all()
    assert not gradient[:, 2:].any()
    assert float(gradient[:, :2].norm(dim=1).mean()) == pytest.approx(0.5, rel=1e-4)
    twin = GradientBalancer(["a", "b", "c"])
    twin.load_state_dict(balancer.state_dict())
    weights = {"a": 1.0, "b": 1.0, "c": 0.0}
    assert torch.equal(twin(x, terms(x, 5.0), weights), balancer(x, terms(x, 5.0), weights))
