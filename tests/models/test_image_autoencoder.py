"""The image autoencoder: geometry, initialisation, training and inference, each at tiny size."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl.models.image_autoencoder import INITIAL_LOGVAR, LOGVAR_BOUND, ImageAutoencoder
from tests.helpers.errors import refused


def tiny(**changes: Any) -> ImageAutoencoder:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "size": (24, 32),
        "latent_size": (3, 4),
        "latent_channels": 4,
        "widths": [8, 16, 16],
        "blocks": [1, 0, 2],
        "patch": 2,
    }
    return ImageAutoencoder(**(arguments | changes))


def images(network: ImageAutoencoder, batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(batch, network.channels, *network.size) * 2 - 1


def randomise(network: nn.Module) -> nn.Module:
    """Move every parameter off its initial value, so that zero-initialised branches take part."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


VARIANTS: list[dict[str, Any]] = [
    {},
    {"channels": 1},
    {"channels": 7, "group_size": 4},
    {"norm": "group", "middle_block": True},
    {"norm": "weight", "middle_block": True},
    {"norm": "none"},
    {"size": (18, 32), "latent_size": (3, 3)},
    {"size": (18, 32), "latent_size": (3, 4)},
    {"patch": 1, "widths": [8, 8, 16, 16], "blocks": [0, 1, 0, 1]},
    {"patch": 8, "widths": [16], "blocks": [1], "decoder_blocks": [3]},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_shapes_and_gradients_reach_every_parameter_after_one_step(changes: dict[str, Any]) -> None:
    network = tiny(**changes)
    x = images(network)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(2):
        optimiser.zero_grad()
        reconstruction, posterior = network(x, sample=True)
        (F.l1_loss(reconstruction, x) + posterior.kl()).backward()
        optimiser.step()
    assert reconstruction.shape == x.shape
    assert posterior.mean.shape == (2, network.latent_channels, *network.latent_size)
    assert posterior.logvar.shape == (2, 1, *network.latent_size)
    dead = [name for name, p in network.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert dead == []


def test_forward_decodes_the_mean_or_a_sample() -> None:
    network = tiny()
    x = images(network)
    reconstruction, posterior = network(x, sample=False)
    assert torch.equal(reconstruction, network.decode(posterior.mean))
    torch.manual_seed(5)
    sampled, posterior = network(x, sample=True)
    torch.manual_seed(5)
    assert torch.equal(sampled, network.decode(posterior.sample()))
    assert not torch.equal(sampled, reconstruction)


def test_tensor_size_reduction_counts_elements() -> None:
    assert ImageAutoencoder().tsr == 48
    assert tiny(size=(18, 32), latent_size=(3, 3)).tsr == 3 * 18 * 32 / (4 * 9)


def test_latent_statistics_are_neutral_buffers_of_the_state_dict() -> None:
    state = tiny().state_dict()
    assert torch.equal(state["latent_mean"], torch.zeros(4))
    assert torch.equal(state["latent_std"], torch.ones(4))


@pytest.mark.parametrize("blocks", [1, 6])
def test_activations_keep_their_variance_through_the_norm_free_network(blocks: int) -> None:
    network = tiny(size=(96, 128), widths=[32, 64, 64, 64, 64], blocks=[blocks] * 5, latent_channels=64)
    # Smooth, as pictures are: white noise loses its variance to the shortcuts' averages, which is their purpose.
    x = F.interpolate(torch.randn(8, 3, 3, 4), (96, 128), mode="bicubic")
    x = x / x.std()
    variances: list[float] = []
    for half in (network.encoder, network.decoder):
        for module in (half.stem, *half.stages):
            module.register_forward_hook(lambda _m, _i, output: variances.append(output.detach().var().item()))
    network(x, sample=False)
    depth = 5 * blocks + 5
    assert len(variances) == 2 * depth
    for first in (0, depth):  # the encoder's stem, the decoder's stem
        relative = [variance / variances[first] for variance in variances[first : first + depth]]
        assert 0.3 < min(relative) <= max(relative) < 3


def test_a_larger_update_of_a_deeper_network_does_not_change_it_more() -> None:
    """Fix-up: with every last layer at the same gain, the output's variance grows alike at 2 and at 32 blocks."""

    def growth(blocks: int) -> float:
        network = tiny(widths=[32], blocks=[blocks], patch=8)
        for name, parameter in network.decoder.named_parameters():
            if "conv3" in name and "original0" in name:
                parameter.data.fill_(blocks**-0.25)  # the last layer's own share of L^(-1/2) once it is off zero
        x = torch.randn(8, 32, 12, 16)
        return float(network.decoder.stages(x).var() / x.var())

    with torch.no_grad():
        assert growth(32) < 2 * growth(2)


def test_log_variance_starts_small_and_stays_bounded() -> None:
    network = tiny()
    x = images(network)
    logvar = network.encode(x).logvar
    assert torch.allclose(logvar, torch.tensor(INITIAL_LOGVAR), atol=0.15)
    for sign in (-1, 1):
        nn.init.constant_(network.encoder.logvar.bias, sign * 1e4)  # type: ignore[arg-type]
        assert network.encode(x).logvar.abs().max().item() <= LOGVAR_BOUND
        assert bool(network(x, sample=True)[0].isfinite().all())


def test_no_convolution_runs_at_full_resolution_with_a_patch() -> None:
    network = tiny(size=(18, 32), latent_size=(3, 4))
    seen: list[int] = []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _m, _i, output: seen.append(output.shape[-1]))
    network(images(network), sample=False)
    assert max(seen) == 16


def test_the_halves_without_a_resize_work_at_any_grid() -> None:
    network = tiny()
    assert network.decoder(torch.randn(1, 4, 4, 3)).shape == (1, 3, 32, 24)
    assert network.encoder(torch.randn(1, 3, 16, 16))[0].shape == (1, 4, 2, 2)


def test_without_a_difference_in_aspect_no_resize_is_built() -> None:
    assert not any("resize" in name for name in tiny().state_dict())
    names = {name for name in tiny(size=(18, 32), latent_size=(3, 4)).state_dict() if "taps" in name}
    assert names == {"encoder.resize.rows.taps", "decoder.resize.rows.taps"}  # 32 columns are 32 columns


@pytest.mark.parametrize("middle_block", [False, True])
def test_folding_keeps_the_outputs(middle_block: bool) -> None:
    network = tiny(middle_block=middle_block, size=(18, 32), latent_size=(3, 3))
    randomise(network)
    x = images(network)
    before, posterior = network(x, sample=False)
    assert network.fold_weight_norm() is network
    after, folded = network(x, sample=False)
    assert torch.allclose(before, after, atol=1e-5)
    assert torch.allclose(posterior.mean, folded.mean, atol=1e-5)
    assert torch.allclose(posterior.logvar, folded.logvar, atol=1e-5)
    assert not any("parametrizations" in name for name in network.state_dict())
    assert network.config["norm"] == "none"


def test_folding_a_group_norm_network_leaves_it_alone() -> None:
    network = tiny(norm="group")
    names = list(network.state_dict())
    assert list(network.fold_weight_norm().state_dict()) == names
    assert network.config["norm"] == "group"


def keep(kept: list[Tensor], tensor: Tensor) -> Tensor:
    kept.append(tensor)
    return tensor


def test_checkpointing_changes_memory_but_no_gradient() -> None:
    gradients = []
    for checkpoint in (False, True):
        network = tiny(checkpoint=checkpoint)
        randomise(network)
        torch.manual_seed(3)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(keep, kept), lambda tensor: tensor):
            network(images(network), sample=True)[0].square().mean().backward()
        gradients.append(([p.grad for p in network.parameters()], sum(tensor.numel() for tensor in kept)))
    (plain, plain_saved), (recomputed, recomputed_saved) = gradients
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))  # type: ignore[arg-type]
    assert recomputed_saved < plain_saved


@pytest.mark.parametrize("norm", ["weight", "group"])
def test_channels_last_float64_and_bfloat16_autocast_agree_with_float32(norm: Any) -> None:
    network = tiny(norm=norm, middle_block=True)
    randomise(network)
    x = images(network)
    expected, _ = network(x, sample=False)
    last, _ = network(x.contiguous(memory_format=torch.channels_last), sample=False)
    assert torch.allclose(last, expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low, posterior = network(x, sample=False)
    assert low.dtype == posterior.mean.dtype == posterior.logvar.dtype == torch.float32
    assert (low - expected).abs().mean().item() < 0.05 * expected.std().item()
    double, _ = network.double()(x.double(), sample=False)
    assert double.dtype == torch.float64
    assert torch.allclose(double.float(), expected, atol=1e-4)


def test_compiles_as_one_graph_forward_and_backward() -> None:
    network = tiny(size=(18, 32), latent_size=(3, 3), middle_block=True)
    randomise(network)
    x = images(network)
    expected = network(x, sample=False)[0]
    # aot_eager traces exactly what inductor would be given, without paying for its code generation.
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    actual = compiled(x, sample=False)[0]
    assert torch.allclose(actual, expected, atol=1e-5)
    actual.square().mean().backward()
    assert all(p.grad is not None for name, p in network.named_parameters() if "logvar" not in name)


def test_encoder_and_decoder_hold_every_parameter_and_can_be_replaced() -> None:
    network, other = tiny(), tiny(decoder_blocks=[0, 0, 1])
    assert all(name.startswith(("encoder.", "decoder.")) for name, _ in network.named_parameters())
    network.decoder = other.decoder
    latent = torch.randn(1, 4, 3, 4)
    assert torch.equal(network.decode(latent), other.decode(latent))


def test_the_configuration_rebuilds_the_network() -> None:
    network = tiny(size=(18, 32), latent_size=(3, 3), decoder_blocks=[1, 1, 0], norm="group")
    twin = ImageAutoencoder(**network.config)
    twin.load_state_dict(network.state_dict())
    assert twin.config == network.config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch": 1}, "spans 12x16 pixels"),
        ({"widths": [8, 16, 16, 16], "blocks": [0, 0, 0, 0]}, "spans 48x64 pixels"),
        ({"latent_channels": 5}, "latent_channels is 5, expected a divisor of the last width 16"),
        ({"widths": [8, 20, 16]}, "widths has 8 before 20"),
        ({"widths": [4, 6, 16]}, "widths has 4 before 6"),
        ({"widths": []}, "widths is [0]"),
        ({"blocks": [1, 1]}, "blocks is [1, 1], expected 3"),
        ({"decoder_blocks": [1, 1, -1]}, "decoder_blocks is [1, 1, -1]"),
        ({"group_size": 3}, "group_size is 3"),
        ({"group_size": 0}, "group_size is [0]"),
        ({"channels": 0}, "channels is [0]"),
        ({"size": (24, -32)}, "size is [24, -32]"),
        ({"norm": "batch"}, 'norm is "batch"'),
    ],
)
def test_impossible_arguments_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with refused("network.arguments", words):
        tiny(**changes)


def test_images_and_latents_of_another_shape_are_refused() -> None:
    network = tiny()
    with refused("network.input", "image is [1, 3, 32, 24]", "[batch, 3, 24, 32]"):
        network.encode(torch.zeros(1, 3, 32, 24))
    with refused("network.input", "image is [1, 1, 24, 32]", "[batch, 3, 24, 32]"):
        network(torch.zeros(1, 1, 24, 32), sample=False)
    with refused("network.input", "latent is [1, 8, 3, 4]", "[batch, 4, 3, 4]"):
        network.decode(torch.zeros(1, 8, 3, 4))
