import math

import pytest
import torch

from owl.losses.pixel import l1, l2, logit_laplace


def test_closed_forms():
    x, y = torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[[[0.5, -1.0]]]])
    assert l1(x, y).item() == pytest.approx(1.25)
    assert l2(x, y).item() == pytest.approx(2.125)


def test_logit_laplace_is_a_density():
    # Over all values that a squeezed pixel could take, exp(-NLL) integrates to 1.
    squeezed = torch.linspace(0, 1, 200_003, dtype=torch.float64)[1:-1]
    target = (squeezed - 0.5) / 0.4
    for centre in (-0.9, 0.0, 0.4):
        density = [torch.exp(-logit_laplace(torch.full_like(t, centre), t)) for t in target[100::200].unsqueeze(1)]
        assert torch.stack(density).mean().item() == pytest.approx(1.0, abs=2e-3)


def test_logit_laplace_of_a_perfect_reconstruction():
    grey = torch.zeros(1, 3, 4, 4)
    assert logit_laplace(grey, grey, scale=0.2).item() == pytest.approx(math.log(2 * 0.2 * 0.25))


def test_logit_laplace_pulls_overshoots_back():
    target = torch.full((1, 1, 1, 3), 1.0)
    reconstruction = torch.tensor([[[[0.9, 1.1, 40.0]]]], requires_grad=True)
    logit_laplace(reconstruction, target, scale=0.1).backward()
    signs = reconstruction.grad.sign().flatten().tolist()
    assert signs == [-1.0, 1.0, 1.0]
    assert torch.isfinite(reconstruction.grad).all()
    # Just inside and outside of the range the slope is the same: no jump at white.
    assert reconstruction.grad[..., 1].item() == pytest.approx(0.4 / 0.09 / 0.1 / 3, rel=1e-5)
