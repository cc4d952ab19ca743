"""The shortcuts of DC-AE and the learned resize."""

import pytest
import torch
import torch.nn.functional as F

from owl.nn.resampling import BandedMatrix, Down, Resize, Up, down_skip
from tests.helpers.errors import refused


def up_skip(x: torch.Tensor, out_channels: int, factor: int) -> torch.Tensor:
    """The shortcut of `Up` as in the paper: repeat channels, then move them into space."""
    return F.pixel_shuffle(x.repeat_interleave(out_channels * factor**2 // x.shape[1], dim=1), factor)


@pytest.mark.parametrize(("channels", "wide", "factor"), [(8, 4, 2), (8, 8, 2), (8, 2, 2), (4, 32, 1), (5, 5, 1)])
def test_down_skip_inverts_up_skip(channels: int, wide: int, factor: int) -> None:
    z = torch.randn(2, channels, 3, 5)
    up = up_skip(z, wide, factor)
    assert up.shape == (2, wide, 3 * factor, 5 * factor)
    assert torch.allclose(down_skip(up, channels, factor), z, atol=1e-6)


def test_down_skip_averages_whole_pixels_when_the_channels_stay() -> None:
    x = torch.randn(2, 8, 4, 6)
    assert torch.allclose(down_skip(x, 8, 2), F.avg_pool2d(x, 2), atol=1e-6)


def test_up_skip_repeats_whole_pixels_when_the_channels_stay() -> None:
    x = torch.randn(2, 8, 4, 6)
    assert torch.equal(up_skip(x, 8, 2), F.interpolate(x, scale_factor=2, mode="nearest"))


@pytest.mark.parametrize(("wide", "narrow", "factor"), [(8, 16, 2), (8, 8, 2), (32, 4, 1)])
def test_without_convolution_the_layers_are_their_shortcuts(wide: int, narrow: int, factor: int) -> None:
    x, z = torch.randn(2, wide, 4, 6), torch.randn(2, narrow, 2, 3)
    down = Down(wide, narrow, factor, gain=0, weight_norm=True)
    up = Up(narrow, wide, factor, gain=0, weight_norm=True)
    assert torch.equal(down(x), down_skip(x, narrow, factor))
    assert torch.equal(up(z), up_skip(z, wide, factor))


def test_the_convolution_is_added_to_the_shortcut() -> None:
    x, z = torch.randn(2, 8, 4, 6), torch.randn(2, 16, 2, 3)
    down, up = Down(8, 16, weight_norm=False), Up(16, 8, weight_norm=False)
    assert torch.allclose(down(x), F.pixel_unshuffle(down.conv(x), 2) + down_skip(x, 16, 2), atol=1e-6)
    assert torch.allclose(up(z), F.pixel_shuffle(up.conv(z), 2) + up_skip(z, 8, 2), atol=1e-6)


def test_layers_and_their_gradients_stay_in_channels_last() -> None:
    layout = torch.channels_last
    x = torch.randn(2, 8, 4, 6).contiguous(memory_format=layout).requires_grad_()
    seen: list[torch.Tensor] = []
    y = Down(8, 16, weight_norm=True)(x)
    y.register_hook(seen.append)
    out = Up(16, 8, weight_norm=True)(y)
    out.backward(torch.randn_like(out))
    assert x.grad is not None
    for tensor in (y, out, seen[0], x.grad):
        assert tensor.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("size", "out_size"), [((45, 80), (64, 64)), ((64, 64), (45, 80)), ((45, 80), (48, 80)), ((20, 30), (13, 29))]
)
def test_resize_starts_as_antialiased_bicubic(size: tuple[int, int], out_size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size) * 2 - 1
    expected = F.interpolate(x, out_size, mode="bicubic", antialias=True)
    assert torch.allclose(Resize(size, out_size)(x), expected, atol=1e-5)


def test_resize_refuses_another_size() -> None:
    with refused("network.input", "24x24", "18x32"):
        Resize((18, 32), (24, 24))(torch.zeros(1, 3, 24, 24))


def test_resize_learns_only_inside_the_band() -> None:
    torch.manual_seed(0)
    matrix = BandedMatrix(16, 12)
    outside = matrix() == 0
    assert int((~outside).sum()) <= matrix.taps.numel() < 16 * 12
    with torch.no_grad():
        matrix.taps.add_(torch.rand_like(matrix.taps))
    assert int((matrix() != 0).sum()) <= matrix.taps.numel()
    matrix().sum().backward()
    assert matrix.taps.grad is not None
    assert torch.equal(matrix.taps.grad, torch.ones_like(matrix.taps))


def test_resize_can_be_described_without_memory_and_rebuilt_from_a_state_dict() -> None:
    with torch.device("meta"):
        empty = Resize((18, 32), (24, 24))
    resize = Resize((18, 32), (24, 24))
    restored = empty.to_empty(device="cpu")
    restored.load_state_dict(resize.state_dict())
    x = torch.randn(1, 2, 18, 32)
    assert torch.equal(restored(x), resize(x))
