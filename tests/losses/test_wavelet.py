import ptwt
import pytest
import torch

from owl.losses.wavelet import dwt, haar

SHAPES = {2: [(2, 3, 8, 6), (1, 2, 5, 7)], 3: [(2, 3, 4, 6, 8), (1, 2, 3, 5, 4)]}
CASES = [(axes, shape) for axes, shapes in SHAPES.items() for shape in shapes]


@pytest.mark.parametrize(("axes", "shape"), CASES)
def test_parseval(axes, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    bands = haar(x, axes)
    assert bands.shape == (*shape[:2], 2**axes, *((n + 1) // 2 for n in shape[2:]))
    assert bands.square().sum().item() == pytest.approx(x.square().sum().item(), rel=1e-5)


def test_equals_ptwt():
    x = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    low, (horizontal, vertical, diagonal) = ptwt.wavedec2(x, "haar", level=1)
    torch.testing.assert_close(haar(x, 2), torch.stack([low, vertical, horizontal, diagonal], dim=2))


def test_bands_of_a_constant_clip():
    bands = haar(torch.ones(1, 1, 2, 2, 2), 3).flatten()
    torch.testing.assert_close(bands, torch.tensor([8**0.5] + 7 * [0.0]))


@pytest.mark.parametrize(("axes", "shape"), CASES)
def test_gradient_vanishes_only_for_equal_inputs(axes, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = x.clone().requires_grad_()
    loss = dwt(y, x, axes)
    loss.backward()
    assert loss == 0
    assert y.grad.abs().sum() == 0
    for seed in range(5):
        other = x.clone()
        other.view(-1)[seed] += 0.1  # a single value differs
        other.requires_grad_()
        dwt(other, x, axes).backward()
        assert other.grad.abs().sum() > 0
