"""R3GAN's losses: closed forms, the authors' own numbers, derivatives, and modes that only the penalties keep."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl.losses.adversarial import (
    OBJECTIVES,
    adaptive_weight,
    annealed,
    discriminator_loss,
    generator_loss,
    logits_and_penalty,
)
from tests.helpers.errors import refused

SHAPES = [(5,), (5, 3, 4)]  # of logits: one an image, and one a patch


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", [discriminator_loss, generator_loss])
def test_equal_logits_cost_log_2_and_better_ones_less(loss, shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape)
    assert float(loss(logits, logits)) == pytest.approx(math.log(2))
    assert float(loss(logits + 1, logits)) < math.log(2) < float(loss(logits - 1, logits))
    assert 0 <= float(loss(logits + 200, logits)) < 1e-6
    assert float(loss(logits - 200, logits)) == pytest.approx(200)  # no overflow


@pytest.mark.parametrize("shape", SHAPES)
def test_a_constant_added_to_the_discriminator_changes_nothing(shape: tuple[int, ...]) -> None:
    real, fake = torch.randn(2, *shape, dtype=torch.float64)
    for loss in (discriminator_loss, generator_loss):
        torch.testing.assert_close(loss(real + 7, fake + 7), loss(real, fake))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_both_sides_of_every_objective_pull_in_opposite_directions(name) -> None:
    real, fake = torch.randn(2, 6, 5, requires_grad=True)
    objective = OBJECTIVES[name]
    (for_generator,) = torch.autograd.grad(objective.generator(fake, real), fake)
    upwards, downwards = torch.autograd.grad(objective.discriminator(real, fake), (real, fake))
    inside = (fake > 0) & (fake < 1) & (real > 0) & (real < 1)  # where least squares pulls towards its targets
    for gradient, sign in ((for_generator, -1), (upwards, -1), (downwards, 1)):
        assert (gradient[inside] * sign > 0).all()


def test_hinge_and_least_squares_have_their_closed_forms() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    hinge, squares = OBJECTIVES["hinge"], OBJECTIVES["lsgan"]
    assert float(hinge.discriminator(real, fake)) == pytest.approx((0 + 0.5) / 2 + (0 + 1.5) / 2)
    assert float(hinge.generator(fake, real)) == pytest.approx(1.25)
    assert float(squares.discriminator(real, fake)) == pytest.approx((1 + 0.25) / 2 + (9 + 0.25) / 2)
    assert float(squares.generator(fake, real)) == pytest.approx((16 + 0.25) / 2)


def test_the_generator_wants_the_opposite() -> None:
    real, fake = torch.randn(2, 6, requires_grad=True)
    (upwards,) = torch.autograd.grad(generator_loss(fake, real), fake)
    (downwards,) = torch.autograd.grad(discriminator_loss(real, fake), fake)
    assert bool((upwards < 0).all())
    assert bool((downwards > 0).all())


def test_images_are_compared_with_their_own_index() -> None:
    real, fake = torch.tensor([5.0, -5.0]), torch.tensor([4.0, -6.0])
    assert float(discriminator_loss(real, fake)) == pytest.approx(math.log1p(math.exp(-1)))


@pytest.mark.parametrize("other", [(1,), (5, 1)])
def test_logits_are_not_broadcast(other: tuple[int, ...]) -> None:
    with refused("adversarial.shape", "[5]", str(list(other))):
        discriminator_loss(torch.zeros(5), torch.zeros(other))
    with refused("adversarial.shape", "[5]", str(list(other))):
        generator_loss(torch.zeros(5), torch.zeros(other))


def test_a_linear_discriminator_has_the_squared_norm_of_its_weights_as_both_penalties() -> None:
    weight = torch.randn(3, 6, 8, dtype=torch.float64)
    for images in (torch.randn(4, 3, 6, 8, dtype=torch.float64), torch.zeros(1, 3, 6, 8, dtype=torch.float64)):
        logits, penalty = logits_and_penalty(lambda x: (x * weight).sum((1, 2, 3)) + 3, images)
        torch.testing.assert_close(penalty, weight.square().sum())
        torch.testing.assert_close(logits, (images * weight).sum((1, 2, 3)) + 3)


def test_the_penalty_is_the_mean_over_the_batch() -> None:
    images = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    one_by_one = [logits_and_penalty(bent, image[None])[1] for image in images]
    torch.testing.assert_close(logits_and_penalty(bent, images)[1], torch.stack(one_by_one).mean())


def test_with_patches_that_do_not_overlap_it_is_that_of_the_patches_as_images() -> None:
    weight = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)

    def patches(x: Tensor) -> Tensor:
        return torch.tanh(F.conv2d(x, weight, stride=4)).sum(1)

    crops = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    logits, penalty = logits_and_penalty(patches, images)
    assert logits.shape == (2, 2, 3)
    alone, expected = logits_and_penalty(lambda x: patches(x).flatten(), crops)
    torch.testing.assert_close(logits.flatten(), alone)
    torch.testing.assert_close(penalty, expected)


def bent(x: Tensor) -> Tensor:
    """A smooth discriminator, float[B]."""
    return torch.tanh(x).flatten(1).sum(1).square() / 10


def test_the_penalty_is_the_derivative_and_its_gradient_the_derivative_of_that() -> None:
    images = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    weight = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def penalty(weight: Tensor) -> Tensor:
        return logits_and_penalty(lambda x: torch.tanh(F.conv2d(x, weight)).square().sum((1, 2, 3)), images)[1]

    assert torch.autograd.gradcheck(penalty, weight)
    step, slopes = 1e-5, []
    for index in range(images[0].numel()):
        shift = torch.zeros_like(images[0]).flatten()
        shift[index] = step
        shift = shift.view(images.shape[1:])
        slopes.append((bent(images + shift) - bent(images - shift)) / (2 * step))
    expected = torch.stack(slopes, 1).square().sum(1).mean()
    torch.testing.assert_close(logits_and_penalty(bent, images)[1], expected, rtol=1e-7, atol=0)


def test_noise_estimates_the_penalty_when_divided_by_its_variance() -> None:
    images, scale = torch.randn(1, 2, 4, 4, dtype=torch.float64), 1e-3
    noise = scale * torch.randn(20000, 2, 4, 4, dtype=torch.float64)
    estimate = (bent(images + noise) - bent(images)).square().mean() / scale**2
    torch.testing.assert_close(logits_and_penalty(bent, images)[1], estimate, rtol=0.05, atol=0)


def test_no_gradient_reaches_what_made_the_images_and_grad_mode_does_not_matter() -> None:
    source = torch.randn(2, 1, 3, 3, requires_grad=True)
    weight = torch.randn(1, 1, 3, 3, requires_grad=True)
    logits, penalty = logits_and_penalty(lambda x: torch.tanh(F.conv2d(x, weight)).flatten(), source * 2)
    (logits.sum() + penalty).backward()
    assert source.grad is None
    assert weight.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(
            logits_and_penalty(lambda x: torch.tanh(F.conv2d(x, weight)).flatten(), source * 2)[1], penalty
        )


def test_the_penalty_is_computed_in_float32_under_autocast() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(0))
    images = torch.randn(2, 3, 5, 5)
    expected = logits_and_penalty(network, images)
    with torch.autocast("cpu", torch.bfloat16):
        under = logits_and_penalty(network, images)
        halved = logits_and_penalty(network, images.bfloat16())  # as a decoder may hand over
    for value, other, low in zip(expected, under, halved, strict=True):
        assert torch.equal(value, other)
        assert low.dtype == torch.float32


def test_the_numbers_of_the_authors() -> None:
    """``source`` in the file names their code; it is the first image of three."""
    reference = json.loads((Path(__file__).parent / "r3gan.json").read_text())
    real, fake, weight, bias, out = (
        torch.tensor(reference[name], dtype=torch.float64)
        for name in ("real", "fake", "conv_weight", "conv_bias", "out_weight")
    )

    def discriminator(x: Tensor) -> Tensor:
        return torch.tanh(F.conv2d(x, weight, bias)).flatten(1) @ out + reference["offset"]

    real_logits, r1 = logits_and_penalty(discriminator, real)
    fake_logits, r2 = logits_and_penalty(discriminator, fake)
    found = {
        "logits_real": real_logits,
        "logits_fake": fake_logits,
        "r1": r1,
        "r2": r2,
        "discriminator_loss": discriminator_loss(real_logits, fake_logits),
        "generator_loss": generator_loss(fake_logits, real_logits),
    }
    for name, value in found.items():
        assert value.item() == pytest.approx(reference[name], rel=1e-9), name


def test_annealing_is_a_cosine_that_stays_at_its_ends() -> None:
    assert annealed(150, 15, 0) == annealed(150, 15, -1) == 150
    assert annealed(150, 15, 1) == annealed(150, 15, 2) == pytest.approx(15)
    assert annealed(150, 15, 0.5) == pytest.approx(82.5)
    assert annealed(0.9, 0.99, 1 / 3) == pytest.approx(0.9 + 0.09 / 4)


def test_the_adaptive_weight_balances_the_gradients_of_the_last_layer() -> None:
    layer = nn.Conv2d(2, 3, 1)
    image = layer(torch.randn(2, 2, 4, 4))
    reconstruction, adversarial = image.square().mean(), 0.01 * image.sin().sum()
    weight = adaptive_weight(reconstruction, adversarial, layer.parameters())
    assert not weight.requires_grad
    norms = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)]).norm()
        for loss in (reconstruction, adversarial)
    ]
    torch.testing.assert_close(weight, norms[0] / (norms[1] + 1e-4))
    (reconstruction + weight * adversarial).backward()  # both graphs are still there
    assert adaptive_weight(*[layer(torch.ones(1, 2, 1, 1)).sum() * f for f in (1e3, 1e-9)], [layer.weight]) == 1e4


GRID = torch.cartesian_prod(torch.arange(-2.0, 3.0), torch.arange(-2.0, 3.0))  # 25 modes
SPREAD = 0.05
SAMPLES = 1000


def modes_covered(gamma: float, steps: int = 750) -> tuple[int, float]:
    """Train on a grid of 25 Gaussians; return the covered modes, and the share of generated samples that are in one.

    The generator is a table of samples, all near the origin at first, so only the losses decide where they go.
    """
    torch.manual_seed(0)
    generator = nn.Embedding(SAMPLES, 2)
    nn.init.normal_(generator.weight, std=0.1)
    frequencies = 2.0 ** torch.arange(-2, 2) * math.pi  # periods of 8 to 1, so that modes are soon distinguished
    network = nn.Sequential(
        nn.Linear(2 + 4 * len(frequencies), 64),
        nn.LeakyReLU(0.2),
        nn.Linear(64, 64),
        nn.LeakyReLU(0.2),
        nn.Linear(64, 1),
    )

    def discriminator(x: Tensor) -> Tensor:
        waves = (x.unsqueeze(-1) * frequencies).flatten(1)
        return network(torch.cat([x, waves.sin(), waves.cos()], 1)).squeeze(1)

    optimizers = [
        torch.optim.Adam(part.parameters(), lr, betas=(0.0, 0.99)) for part, lr in ((generator, 0.02), (network, 0.001))
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: annealed(1, 0.05, step / steps))
        for optimizer in optimizers
    ]
    for step in range(steps):
        real = GRID[torch.randint(len(GRID), (256,))] + SPREAD * torch.randn(256, 2)
        fake = generator(torch.randint(SAMPLES, (256,)))
        real_logits, r1 = logits_and_penalty(discriminator, real)
        fake_logits, r2 = logits_and_penalty(discriminator, fake)
        penalty = annealed(gamma, gamma / 10, step / steps) / 2 * (r1 + r2)
        for optimizer, loss in zip(
            optimizers,
            (
                generator_loss(discriminator(fake), real_logits.detach()),
                discriminator_loss(real_logits, fake_logits) + penalty,
            ),
            strict=True,
        ):
            optimizer.zero_grad()
            loss.backward(inputs=optimizer.param_groups[0]["params"])
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    distance, mode = torch.cdist(generator.weight.detach(), GRID).min(1)
    counts = torch.bincount(mode[distance < 4 * SPREAD], minlength=len(GRID))
    return int((counts >= SAMPLES / len(GRID) / 4).sum()), counts.sum().item() / SAMPLES


@pytest.mark.slow
def test_all_25_modes_are_covered_with_penalties_and_most_are_lost_without() -> None:
    modes, share = modes_covered(gamma=1.0)
    assert modes == 25
    assert share > 0.9
    assert modes_covered(gamma=0.0)[0] < 15
