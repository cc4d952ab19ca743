import lpips as reference_lpips
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from owl.losses.lpips import LPIPS, ShiftTolerantAlexNet, blur_down, random_crops
from owl.nn.frozen import trained
from tests.helpers.errors import refused

# Answers of the wheel's own code, stlpips_pytorch 0.0.2, LPIPS(net="alex", variant="shift_tolerant"), to pair(2, H, W).
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


class Plain(torch.nn.Module):
    """The shift-tolerant network as its paper draws it, with every output computed before the blur drops some."""

    def __init__(self, trunk: ShiftTolerantAlexNet) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, image: Tensor) -> list[Tensor]:
        net = self.trunk
        first = F.relu(self.blur(net.conv1(image)))
        second = F.relu(net.conv2(self.blur(F.max_pool2d(first, 3, stride=1))))
        third = F.relu(net.conv3(self.blur(F.max_pool2d(second, 3, stride=1))))
        fourth = F.relu(net.conv4(third))
        return [first, second, third, fourth, F.relu(net.conv5(fourth))]

    def blur(self, x: Tensor) -> Tensor:
        kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
        padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
        return F.conv2d(padded, kernel.expand(x.shape[1], 1, 3, 3), stride=2, groups=x.shape[1])


@pytest.mark.parametrize("size", [(32, 32), (33, 40), (40, 35), (37, 33)])
def test_the_fast_network_is_the_plain_one(lpips, size):
    image = pair(1, *size)[0].requires_grad_()
    answers = []
    for network in (lpips.trunk, Plain(lpips.trunk)):
        features = network(image)
        weighted = sum((f * torch.linspace(-1, 1, f.numel()).view_as(f)).mean() for f in features)
        answers.append((features, torch.autograd.grad(weighted, image)[0]))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-5, atol=1e-5)
    gradient, expected = answers[0][1], answers[1][1]
    assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()


def test_blur_keeps_constants_and_size():
    assert torch.equal(blur_down(torch.ones(1, 2, 7, 8)), torch.ones(1, 2, 5, 5))


def test_crops_are_matched_and_cover_everything():
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(50.0), indexing="ij")
    x = torch.stack([rows + 1000 * i for i in range(6)]).unsqueeze(1)
    y = torch.stack([columns + 1000 * i for i in range(6)]).unsqueeze(1)
    generator = torch.Generator().manual_seed(0)
    tops, lefts = set(), set()
    for _ in range(60):
        a, b = random_crops(x, y, 16, count=4, generator=generator)
        assert a.shape == b.shape == (4, 1, 16, 16)
        samples = a[:, 0, 0, 0].div(1000, rounding_mode="floor")
        assert torch.equal(samples, b[:, 0, 0, 0].div(1000, rounding_mode="floor"))
        assert len(samples.unique()) == 4
        assert torch.equal(a - a[:, :, :1], (rows[:16, :16] + torch.zeros(4, 1, 16, 16)))
        tops.update((a[:, 0, 0, 0] % 1000).int().tolist())
        lefts.update((b[:, 0, 0, 0] % 1000).int().tolist())
    assert tops == set(range(25))
    assert lefts == set(range(35))


def test_crops_larger_than_the_image_keep_it_whole():
    x, y = torch.randn(3, 3, 20, 30), torch.randn(3, 3, 20, 30)
    a, b = random_crops(x, y, 24)
    assert a.shape == b.shape == (3, 3, 20, 24)


def test_too_small_images_are_refused(lpips):
    with refused("lpips.size", "16x64", "32"):
        lpips(torch.zeros(1, 3, 16, 64), torch.zeros(1, 3, 16, 64))


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
    assert not trained(lpips)
    assert not lpips.state_dict()


def test_gradient_is_finite_where_all_features_vanish(lpips):
    # The derivative of the norm of a zero vector is 0/0: a flat image must not make the network NaN.
    flat = torch.zeros(1, 64, 4, 4, requires_grad=True)
    F.normalize(flat, eps=1e-10).square().sum().backward()
    assert torch.isfinite(flat.grad).all()
    black = torch.full((1, 3, 48, 48), -1.0, requires_grad=True)
    lpips(black, pair(1, 48, 48)[1]).sum().backward()
    assert torch.isfinite(black.grad).all()


def test_weights_make_no_sense_with_the_default_net(tmp_path):
    with refused("lpips.weights", "x.pth", "st_alex"):
        LPIPS("st_alex", weights=str(tmp_path / "x.pth"))


def test_missing_file_names_the_option(tmp_path):
    with refused("lpips.missing-weights", "absent.pth", "alex"):
        LPIPS("alex", weights=str(tmp_path / "absent.pth"))


def test_local_trunk_is_used_with_the_heads_of_lpips(tmp_path):
    torch.manual_seed(0)
    original = reference_lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = {"features." + name.split(".", 1)[1]: value for name, value in original.net.state_dict().items()}
    torch.save(state | {"classifier.6.bias": torch.zeros(1000)}, tmp_path / "alexnet.pth")
    lpips = LPIPS("alex", weights=str(tmp_path / "alexnet.pth"))
    assert lpips.name == "lpips_alex"
    x, y = pair(2, 64, 64)
    torch.testing.assert_close(lpips(x, y), original(x, y).flatten(), rtol=1e-5, atol=1e-7)


def test_building_leaves_the_random_state_alone(tmp_path):
    # Or the same run with and without the loss would start from different weights.
    before = torch.get_rng_state()
    LPIPS()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_broken_file_is_refused(tmp_path):
    (tmp_path / "alexnet.pth").write_bytes(b"not a checkpoint")
    with refused("lpips.unreadable-weights", "alexnet.pth"):
        LPIPS("alex", weights=str(tmp_path / "alexnet.pth"))


def test_a_trunk_of_another_network_is_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg16.pth")
    with refused("lpips.other-weights", "vgg16.pth", "alexnet"):
        LPIPS("alex", weights=str(tmp_path / "vgg16.pth"))


def test_without_file_and_internet_there_is_an_error_not_a_random_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no server listens there
    with refused("lpips.download", "vgg16", ".pth", "`weights`"):
        LPIPS("vgg")
