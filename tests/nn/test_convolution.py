"""Weight normalisation, fix-up initialisation and the blocks."""

import pytest
import torch
from torch import nn

from owl.nn.convolution import Attention, NormResidualBlock, ResidualBlock, convolution, fold_weight_norm, group_norm


@pytest.mark.parametrize("weight_norm", [True, False])
def test_the_gain_is_the_standard_deviation_of_the_output_for_white_input(weight_norm: bool) -> None:
    torch.manual_seed(0)
    layer = convolution(32, 64, 3, gain=0.7, groups=2, weight_norm=weight_norm)
    assert torch.allclose(layer.weight.flatten(1).norm(dim=1), torch.tensor(0.7))
    inside = layer(torch.randn(4, 32, 32, 32))[..., 1:-1, 1:-1]
    assert inside.std().item() == pytest.approx(0.7, rel=0.05)


def test_a_zero_layer_gives_zero_and_still_learns() -> None:
    torch.manual_seed(0)
    layer = convolution(4, 4, 3, gain=0, bias=False)
    output = layer(torch.randn(1, 4, 5, 5))
    assert torch.equal(output, torch.zeros_like(output))  # a zero direction would be NaN
    (output - 1).square().sum().backward()
    gain = layer.parametrizations.weight.original0  # type: ignore[union-attr]
    assert gain.grad is not None
    assert bool((gain.grad != 0).all())


def blocks() -> list[nn.Module]:
    return [
        ResidualBlock(16, depth=4, group_size=8, weight_norm=True),
        ResidualBlock(16, depth=4, group_size=None, weight_norm=False),
        NormResidualBlock(16, group_size=8),
        Attention(16, group_norm(16), weight_norm=False),
        Attention(16, nn.Identity(), weight_norm=True),
    ]


@pytest.mark.parametrize("index", range(5))
def test_every_block_starts_as_the_identity(index: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 6, 5)
    before = x.clone()
    assert torch.equal(blocks()[index](x), before)
    assert torch.equal(x, before)  # the in-place activations must not reach the input


def test_inner_gain_follows_the_fix_up_rule() -> None:
    def inner(depth: int) -> torch.Tensor:
        return ResidualBlock(8, depth, None, weight_norm=True).conv2.weight.flatten(1).norm(dim=1)

    assert torch.allclose(inner(16) / inner(1), torch.tensor(16 ** (-1 / 4)))


def test_attention_mixes_all_positions_as_softmax_attention_does() -> None:
    torch.manual_seed(0)
    attention = Attention(8, nn.Identity(), weight_norm=False)
    with torch.no_grad():
        attention.project.weight.copy_(torch.eye(8)[:, :, None, None])
    x = torch.randn(2, 8, 3, 4)
    q, k, v = attention.qkv(x).flatten(2).chunk(3, dim=1)  # [2, 8, 12] each
    expected = torch.einsum("bqk,bck->bcq", (torch.einsum("bcq,bck->bqk", q, k) / 8**0.5).softmax(-1), v)
    assert torch.allclose(attention(x), x + expected.unflatten(2, (3, 4)), atol=1e-5)


def test_folding_keeps_the_outputs_and_removes_the_parametrisation() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(convolution(3, 8, 3, gain=2.0), convolution(8, 8, 1), nn.ReLU(), convolution(8, 2, 3))
    x = torch.randn(2, 3, 7, 9)
    before = network(x)
    fold_weight_norm(network)
    assert torch.allclose(network(x), before, atol=1e-6)
    assert sorted(network.state_dict()) == ["0.bias", "0.weight", "1.bias", "1.weight", "3.bias", "3.weight"]
