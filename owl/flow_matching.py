"""Rectified flow (Liu et al. 2022; Lipman et al. 2022), with the convention of the whole project:

x_t = (1 - t) x0 + t eps,    v = dx_t/dt = eps - x0,    x0 = x_t - t v,    eps = x_t + (1 - t) v.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

LevelT = TypeVar("LevelT", float, Tensor)


def add_noise(clean: Tensor, noise: Tensor, noise_level: Tensor) -> Tensor:
    """Compute x_t.

    Args:
        clean: float[B, F, ...], x0.
        noise: The same shape, eps ~ N(0, 1).
        noise_level: float[B, F], t in [0, 1].
    """
    t = noise_level.reshape(*noise_level.shape, *[1] * (clean.ndim - noise_level.ndim))
    return (1 - t) * clean + t * noise


def logit_normal(normal: Tensor, mean: float, std: float) -> Tensor:
    """Noise levels sigmoid(N(mean, std)) in (0, 1) (Stable Diffusion 3, Esser et al. 2024, eq. 19).

    A higher mean trains more at high noise levels, which determine motion; a lower one at low levels, which determine
    detail.

    Args:
        normal: float[...], drawn from N(0, 1).
        mean: Mean of the logit.
        std: Standard deviation of the logit.
    """
    return torch.sigmoid(mean + std * normal)


def velocity_loss(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Compute the mean squared error of the velocity for each frame: float[B, F]."""
    return (velocity.float() - (noise - clean).float()).square().flatten(2).mean(-1)


class Step(NamedTuple):
    """One step of a sampler.

    Attributes:
        x: x_t.
        velocity: Prediction at t.
        t: Noise level.
        next_t: Noise level of the next step, 0 after the last one.
        previous_velocity: Prediction of the previous step; None at the first.
        previous_t: Noise level of the previous step.
        noise: Fresh normal noise, shaped like ``x``.
    """

    x: Tensor
    velocity: Tensor
    t: float
    next_t: float
    previous_velocity: Tensor | None
    previous_t: float
    noise: Tensor


def noise_levels(steps: int, shift: float = 1.0) -> list[float]:
    """Noise levels of the steps of a frame, for ``Engine(noise_levels=...)``: uniform from 1, then shifted towards
    noise.

    Args:
        steps: Evaluations of the network per frame.
        shift: See `shifted`.
    """
    return [shifted(1 - step / steps, shift) for step in range(steps)]


def shifted(level: LevelT, shift: float) -> LevelT:
    """Shift noise levels in [0, 1] towards noise: s u / (1 + (s - 1) u) (Stable Diffusion 3, Esser et al. 2024, section
    5.3.2).

    Args:
        level: u.
        shift: s; 1: no shift.
    """
    return shift * level / (1 + (shift - 1) * level)


def each(function: Callable[..., Tensor], generators: list[torch.Generator], *shape: int) -> Tensor:
    """Draw random numbers for each sample from its generator: float[B, *shape] on the generators' device."""
    return torch.stack([function(shape, generator=own, device=own.device) for own in generators])


def random_levels(steps: int, generator: torch.Generator) -> list[float]:
    """Draw noise levels with random spacing, so that a loss on samples improves those by any number of steps.

    Args:
        steps: Number of steps.
        generator: Generator on the CPU.

    Returns:
        1, and ``steps - 1`` uniform numbers, descending.
    """
    return [1.0, *torch.rand(steps - 1, generator=generator).sort(descending=True).values.tolist()]


def euler(step: Step) -> Tensor:
    """Take an Euler step to the next noise level."""
    return step.x + (step.next_t - step.t) * step.velocity


def adams_bashforth(step: Step) -> Tensor:
    """Take a second-order Adams-Bashforth step from the velocities of this and the previous step, at no extra cost.

    The explicit two-step multistep method; in diffusion models that of PNDM (Liu et al. 2022) and DEIS (Zhang and
    Chen 2023). The first step is Euler's.
    """
    if step.previous_velocity is None:
        return euler(step)
    stride = step.next_t - step.t
    turned = (step.velocity - step.previous_velocity) / (step.t - step.previous_t)
    return step.x + stride * (step.velocity + stride / 2 * turned)


def consistency(step: Step) -> Tensor:
    """Jump to the predicted x0 and add fresh noise of the next noise level, as few-step students are trained to."""
    clean = step.x - step.t * step.velocity
    return (1 - step.next_t) * clean + step.next_t * step.noise


def sample(
    velocity: Callable[[Tensor, float, float], Tensor],
    noise: Tensor,
    levels: Sequence[float],
    sampler: Callable[[Step], Tensor] = euler,
) -> Tensor:
    """Integrate a flow from noise to x0; gradients flow through all steps.

    Args:
        velocity: Called with x_t, its noise level t and the next noise level.
        noise: float[...], x_1.
        levels: Noise level of each step, from 1 down, such as those of `noise_levels`; the last step ends at 0.
        sampler: One step; `consistency` adds the initial noise again at each step.
    """
    x, previous, previous_t = noise, None, 1.0
    for t, next_t in pairwise([*levels, 0.0]):
        predicted = velocity(x, t, next_t)
        x = sampler(Step(x, predicted, t, next_t, previous, previous_t, noise))
        previous, previous_t = predicted, t
    return x


SMALLEST_STEP = 2.0**-7
"""Step size of the plain flow in shortcut models, which therefore take 1 to 128 steps."""


def shortcut_grid(level: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Place shortcuts of step size d = 2^-level on the grid of this step size.

    Args:
        level: int64[...], from 0 (a single step from noise to x0) to 6.
        uniform: float[...] in [0, 1), which selects one of the 2^level steps.

    Returns:
        The step size d and the noise level t in {d, 2 d, ..., 1} at which the step starts, float[...].
    """
    count = 2.0 ** level.to(uniform.dtype)
    return 1 / count, ((uniform * count).floor() + 1) / count


def shortcut_target(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, noise_level: Tensor, step_size: Tensor
) -> Tensor:
    """Compute the average velocity of two steps of half the size, the target of one step (Frans et al. 2024, eq. 4).

    With x_t = (1 - t) x0 + t eps, a step of size d leads from t to t - d: the second half starts at t - d / 2.

    Args:
        velocity: Called with x_t, noise levels float[B] and step sizes float[B]; call it without gradients.
        x: float[B, ...], x_t.
        noise_level: float[B], t.
        step_size: float[B], d, at most t.
    """
    half = step_size / 2
    first = velocity(x, noise_level, half)
    middle = x - half.reshape(-1, *[1] * (x.ndim - 1)) * first
    return (first + velocity(middle, noise_level - half, half)) / 2


def consistency_target(
    teacher: Callable[[Tensor, Tensor], Tensor],
    student: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    noise_level: Tensor,
    next_level: Tensor,
) -> Tensor:
    """Compute the target of the student's x0 in consistency distillation (Song et al. 2023, algorithm 2).

    It is the student's own prediction a little further along the teacher's flow, after one Euler step of the teacher
    from t to t'. At t' = 0 that prediction is x itself, since x0 = x_t - t v, and this holds all others in place.

    Args:
        teacher: Velocity at x_t and t.
        student: The same of the student.
        x: float[B, ...] or, with a noise level per frame, float[B, F, ...]: x_t.
        noise_level: float[B] or float[B, F], t.
        next_level: The same shape, t', in [0, t).

    Returns:
        Like ``x``, without gradient.
    """
    shape = (*noise_level.shape, *[1] * (x.ndim - noise_level.ndim))
    with torch.no_grad():
        moved = x + (next_level - noise_level).view(shape) * teacher(x, noise_level)
        return moved - next_level.view(shape) * student(moved, next_level)


def to_interval(noise_level: Tensor, intervals: int) -> Tensor:
    """Round noise levels in (0, 1] up to one of 1 / intervals, 2 / intervals, ..., 1."""
    return (noise_level * intervals).ceil() / intervals
