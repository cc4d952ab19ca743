"""Shapes for any patch, one coordinate system for both grids, a null embedding that learns, decoding without chance."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from owl import models
from owl.flow_matching import SMALLEST_STEP
from owl.models.diffusion_decoder import DiTDecoder
from owl.models.image_decoder import ImageDecoder
from owl.nn.frozen import trained
from owl.optim.configuration import parameter_groups
from tests.helpers.errors import refused
from tests.helpers.proxies import save_proxy

LATENT_TOKENS = ("shared", "separate", "none")
BASE = {"widths": [8, 16, 16], "blocks": [1, 1, 1]}


def lively(with_base: bool = False, **changes: Any) -> DiTDecoder:
    """A tiny decoder whose layers all do something: those that start at zero would hide what tests look for."""
    torch.manual_seed(0)
    geometry = {"channels": 3, "size": (32, 48), "latent_size": (4, 6), "latent_channels": 2} | changes
    network = DiTDecoder(**{"patch": (8, 8), "width": 32, "depth": 2, "heads": 2, "mlp_ratio": 2.0} | geometry)
    if with_base:
        network.add_base(ImageDecoder(3, (32, 48), (4, 6), 2, **BASE))
    with torch.no_grad():
        for name, parameter in trained(network).items():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + name.endswith("norm.weight"))
    return network.eval()


def inputs(network: DiTDecoder, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *network.target, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.randn(batch, *network.inputs["latent"], generator=generator)


@pytest.mark.parametrize("latent_tokens", LATENT_TOKENS)
@pytest.mark.parametrize(
    ("channels", "size", "patch", "tokens"),
    [(3, (32, 48), (8, 8), 24), (4, (15, 8), (5, 2), 12), (1, (7, 6), (7, 1), 6)],
)
def test_a_rectangular_patch_is_a_token(
    latent_tokens: Any, channels: int, size: tuple[int, int], patch: tuple[int, int], tokens: int
) -> None:
    network = lively(channels=channels, size=size, patch=patch, latent_tokens=latent_tokens)
    assert network.tokens == (tokens, 24 if latent_tokens != "none" else 0)
    x, level, latent = inputs(network)
    assert network(x, level, latent).shape == x.shape
    assert network.decode(latent).shape == (2, channels, *size)
    changed = x.clone()
    changed[:, :, : patch[0], : patch[1]] += 1  # of the first token only
    before, after = network._patched(x), network._patched(changed)
    assert (before != after).any(0).any(1).nonzero().flatten().tolist() == [0]
    assert torch.equal(network._unpatched(before), x)


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"patch": (5, 8)}, "5x8"),
        ({"patch": (8, 7)}, "8x7"),
        ({"patch": (0, 8)}, "0x8"),
        ({"width": 40}, "40"),
        ({"depth": 0}, "depth 0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0"),
        ({"latent_tokens": "some"}, "some"),
        ({"prediction": "noise"}, "noise"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 3, "shortcut": True}, "steps is 3"),
        ({"steps": 256, "shortcut": True}, "steps is 256"),
    ],
)
def test_impossible_arguments_are_reported(changes: dict[str, Any], value: str) -> None:
    with refused("network.arguments", value):
        lively(**changes)


def test_latents_of_another_shape_and_impossible_steps_are_reported() -> None:
    network = lively(shortcut=True)
    with refused("network.input"):
        network.decode(torch.zeros(1, 2, 4, 5))
    with refused("network.arguments", "steps is 5"):
        network.decode(torch.zeros(1, 2, 4, 6), steps=5)


def test_a_latent_and_the_patch_at_the_same_place_have_the_same_angle() -> None:
    same = lively()
    turns = same._turns(torch.device("cpu"))
    assert torch.equal(turns[:24], turns[24:])
    rows, columns = lively(latent_size=(2, 3)).positions()
    patches, latent = (torch.stack(part) for part in zip(rows.split([24, 6]), columns.split([24, 6]), strict=True))
    blocks = patches.view(2, 2, 2, 3, 2).mean((2, 4)).flatten(1)  # a latent covers 2x2 patches: it is at their centre
    torch.testing.assert_close(latent, blocks)
    rows, columns = lively(size=(30, 48), patch=(5, 2)).positions()  # 6 x 24 patches
    assert (rows.max(), columns.max()) == (5.5, 23.5)
    assert rows[144:].unique().tolist() == [0.75, 2.25, 3.75, 5.25]
    assert columns[144:].unique().tolist() == [2, 6, 10, 14, 18, 22]


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("latent_tokens", LATENT_TOKENS)
def test_everything_is_trained_but_the_base_and_the_null_embedding_without_dropout(
    latent_tokens: Any, with_base: bool
) -> None:
    network = lively(latent_tokens=latent_tokens, shortcut=True, with_base=with_base)
    x, level, latent = inputs(network)
    network(x, level, latent, network.estimate(latent)).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in trained(network).items()}
    assert not any(name.startswith("base.") for name in gradients)
    assert all(gradient is not None for gradient in gradients.values())  # or DDP would wait for it
    assert not gradients["null"].any()
    unused = {name for name, gradient in gradients.items() if not gradient.any()}
    last = {f"blocks.1.second.{layer}.weight" for layer in ("out", "up", "down", "query_norm")}
    assert unused - {"null"} == (last if latent_tokens == "separate" else set())


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("latent_tokens", LATENT_TOKENS)
def test_hidden_matrices_are_those_of_attention_and_mlp(latent_tokens: Any, with_base: bool) -> None:
    network = lively(latent_tokens=latent_tokens, shortcut=True, with_base=with_base)
    inner, outer = parameter_groups(network)
    names = {id(parameter): name for name, parameter in trained(network).items()}
    layers = {names[id(p)].split(".")[-2] for p in inner["params"] if p.ndim > 1}
    assert layers == {"qkv", "out", "up", "down"}
    assert len(inner["params"]) + len(outer["params"]) == len(names)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("latent_tokens", LATENT_TOKENS)
def test_a_dropped_latent_does_not_matter_and_its_null_embedding_learns(latent_tokens: Any, with_base: bool) -> None:
    network = lively(latent_tokens=latent_tokens, with_base=with_base)
    x, level, latent = inputs(network)
    base = network.estimate(latent)
    known = torch.tensor([True, False])
    velocity = network(x, level, latent, base, known=known)
    velocity.square().sum().backward()
    assert network.null.grad.any()
    other = network(x, level, latent + 1, None if base is None else base + 1, known=known)
    assert torch.equal(other[1], velocity[1])
    assert not torch.allclose(other[0], velocity[0])
    torch.testing.assert_close(velocity[:1], network(x[:1], level[:1], latent[:1], None if base is None else base[:1]))


def test_every_token_of_the_latent_reaches_every_patch() -> None:
    network = lively()
    x, level, latent = inputs(network, 1)
    latent.requires_grad_()
    network(x, level, latent)[0, 0, 0, 0].backward()
    assert (latent.grad != 0).any(1).all()


def test_guidance_extrapolates_from_the_null_embedding() -> None:
    network, guided = lively(steps=1), lively(steps=1, guidance=3.0)
    _, _, latent = inputs(network)
    level, nothing = torch.ones(2), torch.zeros(2, dtype=torch.bool)
    noise = network.noise.expand(2, -1, -1, -1)
    null = noise - network(noise, level, latent, known=nothing)
    expected = null + 3 * (network.decode(latent) - null)
    torch.testing.assert_close(guided.decode(latent), expected, atol=1e-4, rtol=1e-4)


def test_both_predictions_are_a_velocity() -> None:
    clean, velocity = lively(prediction="clean"), lively(prediction="velocity")
    x, level, latent = inputs(clean)
    x0 = x - level[:, None, None, None] * clean(x, level, latent)
    torch.testing.assert_close(x0, velocity(x, level, latent), atol=1e-4, rtol=1e-4)  # the same output, read as x0
    assert clean(x, torch.zeros(2), latent).isfinite().all()


def test_decoding_is_deterministic_and_frames_share_their_noise() -> None:
    network = lively()
    _, _, latent = inputs(network)
    decoded = network.decode(latent)
    assert torch.equal(decoded, network.decode(latent))
    torch.testing.assert_close(network.decode(latent[:1]), decoded[:1])
    twice = network.decode(latent[:1].expand(2, -1, -1, -1))
    assert torch.equal(twice[0], twice[1])
    assert not torch.allclose(network.decode(latent, noise=torch.randn(2, *network.target)), decoded)
    assert not torch.allclose(network.decode(latent, steps=2), decoded)
    assert lively().noise.equal(network.noise)
    torch.testing.assert_close(lively(steps=2).decode(latent), network.decode(latent, steps=2))


def test_a_shortcut_model_is_given_the_size_of_its_step() -> None:
    network = lively(shortcut=True)
    seen: list[tuple[float, float]] = []
    hook = network.register_forward_pre_hook(lambda _, given: seen.append((given[1][0].item(), given[4][0].item())))
    x, level, latent = inputs(network)
    network.decode(latent, steps=4)
    hook.remove()
    assert seen == [(1, 0.25), (0.75, 0.25), (0.5, 0.25), (0.25, 0.25)]
    smallest = network(x, level, latent, None, torch.full((2,), SMALLEST_STEP))
    assert torch.equal(network(x, level, latent, None, None), smallest)
    assert not torch.allclose(network(x, level, latent, None, torch.full((2,), 0.25)), smallest)


def test_steps_of_every_size_start_alike() -> None:
    new = DiTDecoder(3, (32, 48), (4, 6), 2, shortcut=True, width=32, depth=1, heads=2)
    for parameter in (*new.blocks.parameters(), *new.target_out.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    x, level, latent = inputs(new)
    small, large = (new(x, level, latent, None, torch.full((2,), size)) for size in (SMALLEST_STEP, 1.0))
    assert torch.equal(small, large)
    (large - 1).square().sum().backward()
    assert new.step.second.weight.grad.any()


def test_targets_are_relative_to_the_base_and_standardised() -> None:
    network = lively(with_base=True)
    network.target_mean.copy_(torch.tensor([0.1, 0.2, 0.3]))
    network.target_std.copy_(torch.tensor([0.5, 0.25, 2.0]))
    image, (_, _, latent) = torch.randn(2, 3, 32, 48), inputs(network)
    base = network.base.decode(latent)
    assert torch.equal(network.estimate(latent), base)
    target = network.to_target(image, base)
    torch.testing.assert_close(target[:, 1], (image[:, 1] - base[:, 1] - 0.2) * 4)
    torch.testing.assert_close(network.to_image(target, base), image)
    torch.testing.assert_close(network.to_image(network.to_target(image, None), None), image)
    torch.nn.init.zeros_(network.target_out.linear.weight)  # the network says: nothing is left
    torch.nn.init.zeros_(network.target_out.linear.bias)
    mean = network.target_mean[:, None, None]
    torch.testing.assert_close(network.decode(latent), base + mean)


@pytest.mark.parametrize("with_base", [False, True])
def test_an_export_decodes_the_same(with_base: bool, tmp_path: Any) -> None:
    network = lively(with_base=with_base, latent_tokens="separate", shortcut=True)
    network.target_std.fill_(0.3)
    models.save(network, tmp_path)
    _, _, latent = inputs(network)
    torch.testing.assert_close(models.load(tmp_path).decode(latent), network.decode(latent))


def test_recomputing_activations_changes_nothing() -> None:
    plain, saving = lively(), lively(checkpoint=True)
    for network in (plain, saving):
        network.train()(*inputs(network)).square().sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(saving.get_parameter(name).grad, parameter.grad)


def test_a_network_in_bfloat16_decodes() -> None:
    network = lively(with_base=True)
    _, _, latent = inputs(network)
    expected = network.decode(latent)
    found = network.bfloat16().decode(latent.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_the_target_can_be_the_latent_of_another_autoencoder(tmp_path: Path) -> None:
    save_proxy(tmp_path / "proxy")
    network = lively(True, proxy=str(tmp_path / "proxy"), patch=(4, 2))
    assert network.target == (4, 16, 24)
    x, level, latent = inputs(network)
    base = network.estimate(latent)
    assert base.shape == (2, 4, 16, 24)
    assert network(x, level, latent, base).shape == x.shape
    with torch.no_grad():
        image = torch.rand(2, 3, 32, 48) * 2 - 1
        assert torch.allclose(network.to_target(image, base) + base, network.proxy.encode(image), atol=1e-6)
        encoded_and_decoded = network.proxy.decode(network.proxy.encode(image))
        assert torch.allclose(network.to_image(network.to_target(image, base), base), encoded_and_decoded, atol=1e-5)
    decoded = network.decode(latent)
    assert decoded.shape == (2, 3, 32, 48)
    assert not any(name.startswith("proxy") for name in (*trained(network), *network.state_dict()))

    models.save(network, tmp_path / "export")
    checkpoint = network.state_dict()
    again = DiTDecoder(**network.config)
    again.load_state_dict(checkpoint)
    assert torch.equal(again.decode(latent), decoded)
    shutil.rmtree(tmp_path / "proxy")
    loaded = models.load(tmp_path / "export").to(torch.bfloat16)
    assert torch.allclose(loaded.decode(latent.bfloat16()).float(), decoded, atol=0.2)
    with refused("proxy.missing", "proxy"):
        DiTDecoder(**network.config).load_state_dict(checkpoint)


def test_a_patch_must_divide_the_latent_of_the_proxy(tmp_path: Path) -> None:
    save_proxy(tmp_path)
    with refused("network.arguments", "5x2", "16x24"):
        lively(proxy=str(tmp_path), patch=(5, 2))
