"""Discriminators: their inputs, any image size, exact penalties, gradients at every pixel."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from owl import models
from owl.losses.adversarial import discriminator_loss, generator_loss, logits_and_penalty
from owl.models.discriminators import Discriminator, PatchDiscriminator, ResNetDiscriminator
from tests.helpers.errors import refused

RESNET = {"widths": [8, 16], "blocks": [1, 2], "group_size": 4}
PATCH = {"width": 4, "layers": 2}
KINDS: list[tuple[type[Discriminator], dict[str, Any]]] = [
    (ResNetDiscriminator, RESNET),
    (ResNetDiscriminator, RESNET | {"patch": 1, "frames": 2}),
    (ResNetDiscriminator, RESNET | {"patch": 4, "paired": True}),
    (PatchDiscriminator, PATCH),
    (PatchDiscriminator, PATCH | {"layers": 1, "frames": 2, "paired": True}),
]
SIZES = [(16, 16), (20, 32), (36, 20), (12, 64)]  # landscape, portrait, and grids that do not halve evenly

any_kind = pytest.mark.parametrize(("kind", "arguments"), KINDS)


def build(kind: type[Discriminator], arguments: dict[str, Any], trained: bool = True) -> Discriminator:
    """Where it is trained, also the last layers of the blocks, zero at first, take part."""
    torch.manual_seed(0)
    network = kind(**arguments)
    if trained:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return network


def shown(network: Discriminator, size: tuple[int, int] = (20, 36), batch: int = 3) -> Tensor:
    return torch.rand(batch, network.in_channels, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@any_kind
@pytest.mark.parametrize("size", SIZES)
def test_images_of_any_aspect_ratio_are_judged_in_every_pixel(
    kind: type[Discriminator], arguments: dict[str, Any], size: tuple[int, int]
) -> None:
    network = build(kind, arguments)
    images = shown(network, size).requires_grad_()
    logits = network(images)
    assert logits.shape[0] == 3
    assert logits.ndim == (1 if kind is ResNetDiscriminator else 3)
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    assert bool((gradient.abs().sum(1) > 0).all())
    # each image by itself, as the penalty demands
    torch.testing.assert_close(network(images[1:2]), logits[1:2], atol=1e-5, rtol=1e-5)


@any_kind
def test_losses_and_penalties_reach_every_weight(kind: type[Discriminator], arguments: dict[str, Any]) -> None:
    network = build(kind, arguments, trained=False)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01)
    real, fake = shown(network), shown(network).flip(0) * 0.5
    for _ in range(2):  # the first step moves the last layers of the blocks off zero
        optimiser.zero_grad()
        real_logits, r1 = logits_and_penalty(network, real)
        fake_logits, r2 = logits_and_penalty(network, fake)
        (discriminator_loss(real_logits, fake_logits) + 0.5 * (r1 + r2)).backward()
        optimiser.step()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert dead == []


@any_kind
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_the_penalty_is_its_derivative(
    kind: type[Discriminator], arguments: dict[str, Any], memory_format: torch.memory_format
) -> None:
    """Along a random direction of all weights at once, by steps so short that no activation changes its sign."""
    network = build(kind, arguments).double()
    images = shown(network, (12, 20)).double().contiguous(memory_format=memory_format)
    parameters = list(network.parameters())
    directions = [torch.randn_like(p) for p in parameters]
    gradients = torch.autograd.grad(logits_and_penalty(network, images)[1], parameters, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    values = []
    for step in (1e-9, -1e-9):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += step * direction
        values.append(logits_and_penalty(network, images)[1])
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter -= step * direction
    torch.testing.assert_close((values[0] - values[1]) / 2e-9, slope, rtol=1e-4, atol=1e-6)


@any_kind
def test_channels_last_and_bfloat16_autocast_agree_with_float32(
    kind: type[Discriminator], arguments: dict[str, Any]
) -> None:
    network = build(kind, arguments)
    images = shown(network)
    expected = network(images)
    last = network(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(images)
        low.sum().backward()
    assert low.dtype == torch.float32
    assert (low - expected).abs().mean().item() < 0.05 * max(expected.std().item(), 0.1)


def test_the_residual_one_starts_as_a_linear_function_with_logits_of_unit_scale() -> None:
    """Fix-up: every block is the identity, so at first both penalties are the same number everywhere."""
    network = build(ResNetDiscriminator, {"blocks": [4, 4, 4, 4]}, trained=False)
    images = torch.randn(2, 3, 32, 48)
    (one, first), (other, second) = (logits_and_penalty(network, x) for x in images[:, None])
    torch.testing.assert_close(first, second)
    nothing = network(torch.zeros(1, 3, 32, 48))
    torch.testing.assert_close(network(images.sum(0, keepdim=True)) + nothing, one + other, atol=1e-5, rtol=1e-4)
    flat = torch.randn(64, 3, 1, 1).expand(64, 3, 32, 48)
    assert 0.1 < network(flat).std().item() < 3


def test_inner_gains_follow_the_fix_up_rule() -> None:
    def gain(blocks: list[int]) -> float:
        network = ResNetDiscriminator(widths=[16, 16], blocks=blocks)
        return float(network.stages[0].conv2.weight.detach().flatten(1).norm(dim=1).mean())  # type: ignore[union-attr]

    assert gain([8, 8]) / gain([1, 0]) == pytest.approx(16 ** (-1 / 4))


def test_grouped_convolutions_have_the_requested_size() -> None:
    network = ResNetDiscriminator(widths=[16, 32], blocks=[1, 1], group_size=8)
    groups = {
        m.in_channels // m.groups for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    }
    assert groups == {8}
    assert not any("norm" in name for name, _ in network.named_modules())


def test_a_patch_is_70_pixels_wide() -> None:
    network = PatchDiscriminator(width=4)
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = network(images)
    assert logits.shape == (1, 14, 14)
    (gradient,) = torch.autograd.grad(logits[0, 7, 7], images)
    rows, columns = gradient.abs().sum((0, 1)).nonzero(as_tuple=True)
    assert int(rows.max() - rows.min()) + 1 == int(columns.max() - columns.min()) + 1 == 70


@any_kind
def test_the_configuration_rebuilds_the_network_as_an_export_does(
    kind: type[Discriminator], arguments: dict[str, Any], tmp_path: Any
) -> None:
    network = build(kind, arguments)
    models.save(network, tmp_path)
    twin = models.load(tmp_path)
    assert type(twin) is kind
    assert twin.config == network.config
    torch.testing.assert_close(twin(shown(network)), network(shown(network)))


@pytest.mark.parametrize(
    ("network", "thousands"),
    [(ResNetDiscriminator, 512), (PatchDiscriminator, 694)],
)
def test_the_defaults_suit_two_cores(network: type[Discriminator], thousands: int) -> None:
    assert sum(p.numel() for p in network().parameters()) / 1e3 == pytest.approx(thousands, abs=1)  # type: ignore[call-arg]


def test_single_images_and_every_frame_of_clips_are_shown_as_they_are() -> None:
    network = ResNetDiscriminator(**RESNET)
    real, fake = torch.randn(2, 3, 4, 3, 8, 8)
    assert [
        torch.equal(side, images.flatten(0, 1))
        for side, images in zip(network.sides(real, fake), (real, fake), strict=True)
    ] == [True, True]
    left, right = network.sides(real[:, 0], fake[:, 0])
    assert torch.equal(left, real[:, 0])
    assert torch.equal(right, fake[:, 0])


def test_frame_pairs_are_consecutive_frames_as_channels() -> None:
    network = PatchDiscriminator(frames=2)
    real, fake = torch.randn(2, 3, 4, 3, 8, 8)
    sides = network.sides(real, fake)
    for side, clip in zip(sides, (real, fake), strict=True):
        assert side.shape == (9, 6, 8, 8)
        for clip_number in range(3):
            for frame in range(3):
                pair = side[3 * clip_number + frame]
                assert torch.equal(pair[:3], clip[clip_number, frame])
                assert torch.equal(pair[3:], clip[clip_number, frame + 1])


def test_a_frame_pair_distinguishes_flicker_from_stillness_where_single_frames_cannot() -> None:
    """The same frames in another order: the multiset of single frames does not change, that of pairs does."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 3, 16, 16)
    steady, flickering = torch.stack([a, a, b, b], 1), torch.stack([a, b, a, b], 1)
    alone = build(ResNetDiscriminator, RESNET)
    pairs = build(ResNetDiscriminator, RESNET | {"frames": 2})
    torch.testing.assert_close(*(alone(side).sum() for side in alone.sides(steady, flickering)), atol=1e-4, rtol=1e-4)
    left, right = (pairs(side).sum() for side in pairs.sides(steady, flickering))
    assert abs((left - right).item()) > 0.01


def test_the_reconstruction_gan_sees_both_images_in_either_order_and_teaches_through_both() -> None:
    network = build(ResNetDiscriminator, RESNET | {"paired": True})
    real, fake = torch.randn(2, 2, 3, 8, 12)
    fake.requires_grad_()
    true_side, other_side = network.sides(real, fake)
    assert torch.equal(true_side, torch.cat([real, fake], 1))
    assert torch.equal(other_side, torch.cat([fake, real], 1))
    (both,) = torch.autograd.grad(generator_loss(network(other_side), network(true_side)), fake)
    (one,) = torch.autograd.grad(
        generator_loss(network(other_side), network(torch.cat([real, fake.detach()], 1))), fake
    )
    assert not torch.allclose(both, one)
    with torch.no_grad():  # what is perfect cannot be distinguished
        left, right = (network(side) for side in network.sides(real, real))
    assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (ResNetDiscriminator, {"channels": 0}, "channels is 0"),
        (ResNetDiscriminator, {"frames": 0}, "frames 0"),
        (ResNetDiscriminator, {"widths": []}, "widths is []"),
        (ResNetDiscriminator, {"widths": [16, 0], "blocks": [1, 1]}, "widths is [16, 0]"),
        (ResNetDiscriminator, {"patch": 0}, "patch 0"),
        (ResNetDiscriminator, {"blocks": [1, 1]}, "blocks is [1, 1], expected 4"),
        (ResNetDiscriminator, {"blocks": [1, 1, 1, -1]}, "blocks is [1, 1, 1, -1]"),
        (ResNetDiscriminator, {"group_size": 24}, "group_size is 24"),
        (PatchDiscriminator, {"width": 0}, "width is 0"),
        (PatchDiscriminator, {"layers": 0}, "layers 0"),
    ],
)
def test_impossible_arguments_are_refused_by_name(kind: Any, arguments: dict[str, Any], words: str) -> None:
    with refused("network.arguments", words):
        kind(**arguments)


def test_images_of_another_shape_are_refused() -> None:
    resnet, patch = ResNetDiscriminator(**RESNET), PatchDiscriminator(**PATCH)
    for shape in ((1, 4, 8, 8), (1, 3, 9, 8), (3, 8, 8), (1, 3, 0, 8)):
        with refused("network.input", str(list(shape)), "[batch, 3, height, width]", "multiples of 2"):
            resnet(torch.zeros(shape))
    assert resnet(torch.zeros(1, 3, 2, 2)).shape == (1,)
    with refused("network.input", "[1, 3, 11, 40]", "12 pixels"):
        patch(torch.zeros(1, 3, 11, 40))
    assert patch(torch.zeros(1, 3, 12, 12)).shape == (1, 1, 1)


@pytest.mark.parametrize(
    ("real", "fake"),
    [
        ((2, 3, 3, 8, 8), (1, 3, 3, 8, 8)),
        ((2, 3, 4, 8, 8), (2, 3, 4, 8, 8)),
        ((2, 1, 3, 8, 8), (2, 1, 3, 8, 8)),
        ((2, 3, 8, 8), (2, 3, 8, 8)),
        ((8, 8), (8, 8)),
    ],
)
def test_clips_that_cannot_be_compared_are_refused(real: tuple[int, ...], fake: tuple[int, ...]) -> None:
    with refused("network.input", str(list(real)), str(list(fake)), "at least 2 frames"):
        PatchDiscriminator(frames=2).sides(torch.zeros(real), torch.zeros(fake))
