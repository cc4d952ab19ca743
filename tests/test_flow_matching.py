"""The convention of the flow, in closed form, and that the samplers follow it."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from owl.flow_matching import (
    SMALLEST_STEP,
    Step,
    adams_bashforth,
    add_noise,
    consistency,
    consistency_target,
    euler,
    logit_normal,
    noise_levels,
    random_levels,
    sample,
    shifted,
    shortcut_grid,
    shortcut_target,
    velocity_loss,
)


@pytest.fixture
def clean_noise_level() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6), torch.rand(2, 3)


def test_the_closed_forms(clean_noise_level: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    clean, noise, level = clean_noise_level
    assert torch.equal(add_noise(clean, noise, torch.zeros(2, 3)), clean)
    assert torch.equal(add_noise(clean, noise, torch.ones(2, 3)), noise)
    x, velocity, t = add_noise(clean, noise, level), noise - clean, level[:, :, None, None, None]
    torch.testing.assert_close(x[1, 2], (1 - level[1, 2]) * clean[1, 2] + level[1, 2] * noise[1, 2])  # frame by frame
    torch.testing.assert_close(x - t * velocity, clean)
    torch.testing.assert_close(x + (1 - t) * velocity, noise)
    step = 1e-3
    slope = (
        add_noise(clean.double(), noise.double(), level + step) - add_noise(clean.double(), noise.double(), level)
    ) / step
    torch.testing.assert_close(slope, velocity.double(), atol=1e-4, rtol=1e-4)


def test_the_loss_is_zero_at_the_velocity_and_its_mean_square_elsewhere() -> None:
    clean, noise = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6)
    assert not velocity_loss(noise - clean, clean, noise).any()
    offset = torch.arange(6.0).view(2, 3)
    loss = velocity_loss(noise - clean + offset[:, :, None, None, None], clean, noise)
    torch.testing.assert_close(loss, offset.square())
    assert velocity_loss(torch.zeros(2, 3, 4, 5), clean[..., 0], noise[..., 0]).shape == (2, 3)  # audio, too
    assert velocity_loss((noise - clean).bfloat16(), clean, noise).dtype == torch.float32


@pytest.mark.parametrize("levels", [[1.0], noise_levels(4), noise_levels(4, shift=5), [1.0, 0.2]])
@pytest.mark.parametrize("sampler", [adams_bashforth, euler, consistency])
def test_the_exact_velocity_leads_back_in_any_number_of_steps(levels: list[float], sampler: Any) -> None:
    clean = torch.randn(1, 1, 4)
    x, earlier, before = torch.randn(1, 1, 4), None, 1.0
    for level, following in zip(levels, [*levels[1:], 0.0], strict=True):
        velocity = (x - clean) / level  # of the straight line from the clean latent through x
        x = sampler(Step(x, velocity, level, following, earlier, before, torch.randn(1, 1, 4)))
        earlier, before = velocity, level
        assert x.isfinite().all()
    torch.testing.assert_close(x, clean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (adams_bashforth, 2)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_order_of_the_samplers(sampler: Any, order: int, shift: float) -> None:
    def error(steps: int) -> float:
        """After following dx/dt = x from t = 1 to 0, of exact value 1 / e."""
        x, earlier, before = torch.ones(1, 1, 1, dtype=torch.float64), None, 1.0
        levels = noise_levels(steps, shift)
        for level, following in zip(levels, [*levels[1:], 0.0], strict=True):
            velocity = x
            x = sampler(Step(x, velocity, level, following, earlier, before, x))
            earlier, before = velocity, level
        return abs(x.item() - math.exp(-1))

    assert math.log2(error(64) / error(128)) == pytest.approx(order, abs=0.1)


def test_consistency_lands_on_the_following_level_with_the_noise_given() -> None:
    clean, noise, fresh = torch.randn(3, 1, 2, 4)
    level, following = torch.full((1, 2), 0.8), torch.full((1, 2), 0.3)
    step = Step(add_noise(clean, noise, level), noise - clean, 0.8, 0.3, None, 1.0, fresh)
    landed = consistency(step)
    torch.testing.assert_close(landed, add_noise(clean, fresh, following))
    on_the_line = euler(step)
    torch.testing.assert_close(on_the_line, add_noise(clean, noise, following))


def test_levels_of_the_steps() -> None:
    assert noise_levels(4) == [1, 0.75, 0.5, 0.25]
    assert noise_levels(4, shift=5) == pytest.approx([1, 0.9375, 0.8333, 0.625], abs=1e-4)  # those of Self-Forcing
    assert noise_levels(1) == [1]


def test_levels_of_training_are_logit_normal() -> None:
    levels = logit_normal(torch.randn(20_000, generator=torch.Generator().manual_seed(0)), 0.5, 0.8)
    assert 0 < levels.min() < levels.max() < 1
    logits = torch.logit(levels)
    assert logits.mean().item() == pytest.approx(0.5, abs=0.03)
    assert logits.std().item() == pytest.approx(0.8, abs=0.03)


def test_a_sampler_goes_through_the_levels_and_gradients_through_the_sampler() -> None:
    seen: list[tuple[float, float]] = []
    scale = torch.tensor(1.0, requires_grad=True)

    def velocity(x: torch.Tensor, t: float, next_t: float) -> torch.Tensor:
        seen.append((t, next_t))
        return scale * x

    x = sample(velocity, torch.ones(1), [1.0, 0.75, 0.5, 0.25])
    assert seen == [(1, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0)]
    assert x.item() == pytest.approx(0.75**4)
    x.backward()
    assert scale.grad.item() == pytest.approx(-(0.75**3))  # of (1 - scale / 4)^4
    second = sample(velocity, torch.ones(1), noise_levels(64), adams_bashforth)
    assert second.item() == pytest.approx(math.exp(-1), abs=1e-4)
    clean, noise = torch.randn(2, 5)
    assert torch.allclose(
        sample(lambda x, t, _: (x - clean) / t, noise, noise_levels(3), consistency), clean, atol=1e-6
    )


def test_shortcuts_start_on_the_grid_of_their_own_step_size() -> None:
    level, uniform = torch.arange(7).repeat_interleave(1000), torch.rand(7000)
    size, t = shortcut_grid(level, uniform)
    assert size.unique().tolist() == [2.0**-b for b in range(6, -1, -1)]
    for b in range(7):
        begins = (t[level == b] * 2**b).unique()
        assert torch.equal(begins, torch.arange(1, 2**b + 1).float())
    assert [x.item() for x in shortcut_grid(torch.tensor(1), torch.tensor(0.999999))] == [0.5, 1]
    assert [x.item() for x in shortcut_grid(torch.tensor(1), torch.tensor(0.0))] == [0.5, 0.5]


def test_the_exact_flow_of_a_linear_equation_is_consistent_with_itself() -> None:
    """Of dx/dt = a x + b t the step by d from t is known: a wrong direction, half or level does not return it."""
    a, b = 1.3, -0.7

    def value(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """x at the time s of the solution through x at the time t."""
        particular = lambda time: -b / a * time - b / a**2  # noqa: E731
        return (x - particular(t)) * torch.exp(a * (s - t)) + particular(s)

    def mean_velocity(x: torch.Tensor, t: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        t, d = t[:, None], d[:, None]
        return (x - value(x, t, t - d)) / d

    x, levels = torch.randn(64, 5, dtype=torch.float64), torch.arange(7).repeat(10)[:64]
    d, t = shortcut_grid(levels, torch.rand(64, dtype=torch.float64))
    torch.testing.assert_close(shortcut_target(mean_velocity, x, t, d), mean_velocity(x, t, d))
    sizes: list[torch.Tensor] = []

    def noted(x: torch.Tensor, t: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        sizes.append(d)
        return mean_velocity(x, t, d)

    shortcut_target(noted, x, t, d)
    assert torch.equal(torch.stack(sizes), torch.stack([d / 2, d / 2]))


def test_random_levels_start_at_noise_and_descend() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = random_levels(8, generator), random_levels(8, generator)
    for levels in (first, second):
        assert (len(levels), levels[0]) == (8, 1.0)
        assert all(0 <= lower < higher for higher, lower in pairwise(levels))
    assert first != second
    assert random_levels(8, torch.Generator().manual_seed(0)) == first
    assert random_levels(1, generator) == [1.0]


POINT = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
CONSISTENCY_LEVELS = torch.tensor([1.0, 0.5, 0.25, 0.25])
NEXT_LEVELS = torch.tensor([0.75, 0.25, 0.125, 0.0])


def to_point(x: Tensor, t: Tensor) -> Tensor:
    """The velocity of the flow from noise to `POINT`, whose paths are straight."""
    return (x - POINT) / t[:, None, None].clamp(min=1e-6)


def noisy() -> Tensor:
    return add_noise(
        POINT.expand(4, 3, 4), torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(1)), CONSISTENCY_LEVELS
    )


def test_a_perfect_flow_is_consistent() -> None:
    target = consistency_target(to_point, to_point, noisy(), CONSISTENCY_LEVELS, NEXT_LEVELS)
    assert torch.allclose(target, POINT.expand(4, 3, 4), atol=1e-5)


def test_the_target_holds_at_noise_level_zero_whatever_the_student() -> None:
    """There the student's x0 is x itself, which is the teacher's."""
    target = consistency_target(
        to_point, lambda x, t: torch.full_like(x, 7.0), noisy(), CONSISTENCY_LEVELS, NEXT_LEVELS
    )
    assert torch.allclose(target[3], POINT[0], atol=1e-5)
    assert not torch.isclose(target[:3], POINT, atol=0.1).all()


def test_each_frame_may_have_its_own_noise_level() -> None:
    x, level = torch.randn(2, 3, 5), torch.rand(2, 3) + 0.1

    def curved(x: Tensor, t: Tensor) -> Tensor:
        return x.square() * t[..., None]

    together = consistency_target(curved, curved, x, level, level / 2)
    for frame in range(3):
        alone = consistency_target(curved, curved, x[:, frame], level[:, frame], level[:, frame] / 2)
        torch.testing.assert_close(together[:, frame], alone)


def test_levels_are_shifted_towards_noise_alike_as_numbers_and_as_tensors() -> None:
    even = torch.linspace(0, 1, 5)
    torch.testing.assert_close(shifted(even, 5.0), torch.tensor([0, 0.625, 0.8333, 0.9375, 1]), atol=1e-4, rtol=0)
    assert [shifted(level, 5.0) for level in even.tolist()] == pytest.approx(shifted(even, 5.0).tolist())
    assert torch.equal(shifted(even, 1.0), even)


def test_the_target_has_no_gradient() -> None:
    scale = torch.ones((), requires_grad=True)
    target = consistency_target(to_point, lambda x, t: scale * to_point(x, t), noisy(), CONSISTENCY_LEVELS, NEXT_LEVELS)
    assert not target.requires_grad


def test_a_student_learns_to_jump_along_its_teacher() -> None:
    """Two points: the teacher's paths bend, and the student's single step lands where the teacher's many steps do."""
    points = torch.tensor([-1.0, 1.0])

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        level = t[:, None].clamp(min=1e-3)
        weights = torch.softmax(-((x - (1 - level) * points) ** 2) / (2 * level**2), 1)
        return (x - (weights * points).sum(1, keepdim=True)) / level

    torch.manual_seed(0)
    student = torch.nn.Sequential(
        torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1)
    )

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = student(torch.cat([x, t[:, None]], 1))
        return out

    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    intervals = 16
    for _ in range(400):
        level = torch.randint(1, intervals + 1, (128,)) / intervals
        x = add_noise(points[torch.randint(2, (128, 1))], torch.randn(128, 1), level)
        target = consistency_target(teacher, velocity, x, level, level - 1 / intervals)
        loss = (x - level[:, None] * velocity(x, level) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = torch.randn(128, 1)
    with torch.no_grad():
        jumped = noise - velocity(noise, torch.ones(128))
    assert (jumped.sign() == noise.sign()).float().mean() > 0.9
    off = (jumped.abs() - 1).abs().median()
    assert off < 0.5  # after flow matching alone it is about 1: a jump lands between the points


@pytest.mark.parametrize("levels", [[1.0], [1.0, 0.4]])
def test_one_and_two_euler_steps_are_those_of_the_consistency_sampler(levels: list[float]) -> None:
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))

    def velocity(x: Tensor, t: float, next_t: float) -> Tensor:
        return torch.sin(3 * x) + t

    torch.testing.assert_close(sample(velocity, noise, levels), sample(velocity, noise, levels, consistency))


def toy_flow(shortcut: bool) -> Any:
    """Train the flow to four corners; also with a quarter of each batch for shortcuts. Returns v(x, t, d)."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(2) for layer in (nn.Linear(128, 128), nn.SiLU())]
    network = nn.Sequential(nn.Linear(4, 128), nn.SiLU(), *hidden, nn.Linear(128, 2))

    def velocity(x: Tensor, t: Tensor, d: Tensor) -> Tensor:
        return network(torch.cat([x, t[:, None], d.log2()[:, None] / 7], 1))

    steps, size, bootstrapped = 3000, 256, 64 if shortcut else 0
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        clean = 2 * torch.randint(2, (size, 2)) - 1.0 + 0.05 * torch.randn(size, 2)
        noise, t, d = torch.randn(size, 2), torch.rand(size), torch.full((size,), SMALLEST_STEP)
        own = slice(bootstrapped)
        d[own], t[own] = shortcut_grid(torch.randint(7, (bootstrapped,)), torch.rand(bootstrapped))
        x, target = add_noise(clean, noise, t), noise - clean
        with torch.no_grad():
            target[own] = shortcut_target(velocity, x[own], t[own], d[own])
        optimizer.zero_grad()
        (velocity(x, t, d) - target).square().mean().backward()
        optimizer.step()
        schedule.step()
    return velocity


def distance_to_corners(velocity: Any, steps: int, step_size: float) -> float:
    """Mean distance of samples from the nearest corner."""
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))

    def at(x: Tensor, t: float, _: float) -> Tensor:
        return velocity(x, torch.full((len(x),), t), torch.full((len(x),), step_size))

    with torch.no_grad():
        return float((sample(at, noise, noise_levels(steps)).abs() - 1).norm(dim=1).mean())


@pytest.mark.slow
def test_one_step_of_a_shortcut_model_is_better_than_one_of_the_flow_alone() -> None:
    """One step of the flow leads to the mean of all corners, although many steps lead to them."""
    alone, shortcut = toy_flow(shortcut=False), toy_flow(shortcut=True)
    assert distance_to_corners(alone, 64, SMALLEST_STEP) < 0.2
    assert distance_to_corners(alone, 1, SMALLEST_STEP) > 1
    one = distance_to_corners(shortcut, 1, 1.0)
    assert one < 0.4
    assert distance_to_corners(shortcut, 4, 1 / 4) < one
