import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from owl.errors import OwlError
from owl.losses.lpips import LPIPS

# What the wheel's own code (stlpips_pytorch 0.0.2: LPIPS(net="alex", variant="shift_tolerant")) answers for pair(2, H, W).
REFERENCE = {
    (96, 160): (0.0478012115, 0.0552037880),
    (65, 71): (0.0396841466, 0.0321933627),
    (33, 48): (0.0288203098, 0.0265791677),
}


def pair(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Smooth random images and noisy copies, in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    torch.rand(count, 3, height, width, generator=generator)
    coarse = torch.rand(count, 3, height // 8 + 1, width // 8 + 1, generator=generator) * 2 - 1
    image = F.interpolate(coarse, size=(height, width), mode="bilinear")
    noise = torch.randn(count, 3, height, width, generator=generator)
    return image, (image + 0.1 * noise).clamp(-1, 1)


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return LPIPS()


@pytest.mark.parametrize("size", REFERENCE)
def test_equals_the_reference_implementation(lpips, size):
    assert lpips(*pair(2, *size)).tolist() == pytest.approx(REFERENCE[size], abs=1e-6)


def test_is_a_distance(lpips):
    x, y = pair(2, 48, 64)
    assert lpips(x, x).tolist() == [0.0, 0.0]
    torch.testing.assert_close(lpips(x, y), lpips(y, x))
    louder = (x + 3 * (y - x)).clamp(-1, 1)
    assert (lpips(x, louder) > lpips(x, y)).all()


def test_gradient_reaches_the_images_and_nothing_else(lpips):
    x, y = pair(1, 48, 48)
    x.requires_grad_()
    lpips(x, y).sum().backward()
    assert x.grad.abs().sum() > 0
    assert not list(lpips.parameters())
    assert not lpips.state_dict()


def test_gradient_is_finite_where_all_features_vanish(lpips):
    # The derivative of the norm of a zero vector is 0/0: a flat image must not poison the network.
    flat = torch.zeros(1, 64, 4, 4, requires_grad=True)
    F.normalize(flat, eps=1e-10).square().sum().backward()
    assert torch.isfinite(flat.grad).all()
    black = torch.full((1, 3, 48, 48), -1.0, requires_grad=True)
    lpips(black, pair(1, 48, 48)[1]).sum().backward()
    assert torch.isfinite(black.grad).all()


def test_weights_make_no_sense_with_the_default_net(tmp_path):
    with pytest.raises(OwlError, match="leave `weights` out"):
        LPIPS("st_alex", weights=str(tmp_path / "x.pth"))


def test_missing_file_names_the_option(tmp_path):
    with pytest.raises(OwlError, match="correct `weights`"):
        LPIPS("alex", weights=str(tmp_path / "absent.pth"))
