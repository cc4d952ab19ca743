"""Networks with weights in eight bits: near the original, which stays as it was; refused where nothing runs them."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from owl.models.image_autoencoder import ImageAutoencoder
from owl.precision.inference import probe, quantize
from owl.precision.probe import fits
from owl.rollout.engine import Engine
from tests.helpers.errors import refused
from tests.helpers.latents import draw, lively

CPU = torch.device("cpu")


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_weights_are_what_eight_bits_hold_with_a_scale_a_row() -> None:
    network = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 5)).eval().requires_grad_(False)
    weight, last = (layer.weight.clone() for layer in network)
    x = torch.randn(3, 32)
    assert quantize(network[:1], "fp8_weight_only") == 1
    scale = weight.abs().amax(1, keepdim=True) / 448
    expected = x @ ((weight / scale).to(torch.float8_e4m3fn).float() * scale).T + network[0].bias
    torch.testing.assert_close(network[0](x), expected)
    assert quantize(network[1:], "fp8_weight_only") == 0  # five channels
    assert torch.equal(network[1].weight, last)


def test_convolutions_stay() -> None:
    decoder = ImageAutoencoder(3, (32, 48), (4, 6), 4, [8, 16, 16], [1, 1, 1]).eval()
    before = {name: x.clone() for name, x in decoder.state_dict().items()}
    assert quantize(decoder, "fp8_weight_only") == 0
    assert all(torch.equal(x, before[name]) for name, x in decoder.state_dict().items())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_engine_rolls_out_with_weights_in_eight_bits(dtype: torch.dtype | None) -> None:
    network = lively()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.5)
    before = {name: x.clone() for name, x in network.state_dict().items()}
    _, _, controls = draw(network, 4)

    def roll(engine: Engine) -> Tensor:
        engine.reset()
        frames = [engine.step(controls.buttons[:, t], controls.axes[:, t]) for t in range(4)]
        return torch.stack([frame.latents["video"].float() for frame in frames])

    by_hand = deepcopy(network).to(dtype)
    layers = [layer for layer in by_hand.modules() if isinstance(layer, nn.Linear) and fits(layer)]
    assert len(layers) > 4
    with torch.no_grad():
        for layer in layers:
            scale = layer.weight.float().abs().amax(1, keepdim=True) / 448
            layer.weight.copy_((layer.weight.float() / scale).to(torch.float8_e4m3fn).float() * scale)
    eight = roll(Engine(network, dtype=dtype, quantization="fp8_weight_only"))
    rounded, plain = (roll(Engine(given, dtype=dtype)) for given in (by_hand, network))
    if dtype is None:
        torch.testing.assert_close(eight, rounded)
    assert error(eight, rounded) < error(eight, plain) < 0.1  # in bfloat16 the products are rounded too
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())


def test_what_the_device_does_not_run_is_refused(tmp_path: Path) -> None:
    network = lively()
    if probe("fp8_dynamic", CPU) is not None:
        with refused("fp8.device", "fp8_dynamic", "CPU", "bf16 or fp8_weight_only"):
            Engine(network, quantization="fp8_dynamic")
    with refused("fp8.quantization", "int4", "fp8_weight_only or fp8_dynamic"):
        Engine(network, quantization="int4")  # type: ignore[arg-type]
