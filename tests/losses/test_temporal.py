"""The temporal loss: nothing for errors that move with the scene, something for those that do not."""

import pytest
import torch
from torch import Tensor

from owl.losses.temporal import temporal
from tests.helpers.errors import refused

SHIFT = 2
"""Pixels by which the scene moves to the right from frame to frame."""


def sliding(content: Tensor, frames: int = 4) -> Tensor:
    """float[B, C, H, W] -> float[B, frames, C, H, W - 4 * frames] without what was rolled around."""
    clip = torch.stack([content.roll(SHIFT * frame, -1) for frame in range(frames)], 1)
    return clip[..., 2 * frames : -2 * frames]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def true() -> Tensor:
    """float[2, 4, 3, 24, 48] in [-1, 1]."""
    return sliding(2 * torch.rand(2, 3, 24, 64, generator=torch.Generator().manual_seed(0)) - 1)


@pytest.fixture
def flow(true: Tensor) -> Tensor:
    """float[2, 4, 2, 12, 24]."""
    steps = torch.zeros(2, 4, 2, 12, 24)
    steps[:, :, 0] = -SHIFT
    return steps


def test_the_truth_and_errors_that_move_with_the_scene_cost_nothing(true: Tensor, flow: Tensor) -> None:
    assert temporal(true, true, flow) == 0
    assert temporal(true, true, flow + 3) == 0  # also where the flow is wrong
    assert temporal(true + sliding(noise(2, 3, 24, 64)), true, flow) < 1e-5
    brightness = noise(2, 1, 1, 1, 1)
    assert temporal(true + brightness, true, flow) < 1e-6


def test_independent_noise_costs_the_mean_absolute_change_of_the_visible_share(true: Tensor, flow: Tensor) -> None:
    found = temporal(true + noise(*true.shape), true, flow)
    inside = 46 / 48  # two columns have come into view
    assert found == pytest.approx(inside * 0.1 * 2**0.5 * (2 / torch.pi) ** 0.5, rel=0.03)


def test_a_still_error_in_a_moving_scene_costs(true: Tensor, flow: Tensor) -> None:
    assert temporal(true + noise(2, 1, *true.shape[2:]), true, flow) > 0.05


def test_what_was_outside_or_hidden_does_not_count(true: Tensor, flow: Tensor) -> None:
    edge = true[:, :2].clone()
    edge[:, 1, ..., :SHIFT] += 0.5  # came into view
    assert temporal(edge, true[:, :2], flow[:, :2]) == 0
    cut = true[:, :2].clone()
    cut[:, 1] = cut[:, 1].flip(-2)  # another scene
    wrong = torch.stack([cut[:, 0], cut[:, 1] + 0.5], 1)
    assert temporal(wrong, cut, flow[:, :2]) < 0.01
    assert temporal(true[:, :2] + wrong - cut, true[:, :2], flow[:, :2]) > 0.4


def test_gradients_reach_both_frames_and_lower_what_flickers(true: Tensor, flow: Tensor) -> None:
    decoded = (true + noise(*true.shape)).requires_grad_()
    loss = temporal(decoded, true, flow)
    (gradient,) = torch.autograd.grad(loss, decoded)
    step = 1 / decoded[:, 1:].numel()  # each visible element of a change counts alike
    last = gradient[:, -1, ..., SHIFT:]
    assert torch.allclose(last.abs(), torch.full_like(last, step), rtol=1e-3)
    assert (gradient[:, -1, ..., :SHIFT] == 0).all()  # came into view
    first = gradient[:, 0, ..., :-SHIFT]
    assert torch.allclose(first.abs(), torch.full_like(first, step), rtol=1e-3)
    assert (gradient[:, 0, ..., -SHIFT:] == 0).all()  # goes out of it
    assert temporal(decoded - 0.02 / step * gradient, true, flow) < 0.9 * loss


def test_low_precision_is_compared_in_single_precision(true: Tensor, flow: Tensor) -> None:
    decoded = true + noise(*true.shape)
    found = temporal(decoded.bfloat16(), true, flow)
    assert found.dtype == torch.float32
    assert found == pytest.approx(float(temporal(decoded, true, flow)), rel=0.01)


@pytest.mark.parametrize(
    ("clip", "flow_shape"),
    [((2, 1, 3, 8, 8), (2, 1, 2, 4, 4)), ((4, 3, 8, 8), (2, 2, 2, 4, 4)), ((2, 3, 3, 8, 8), (2, 3, 3, 4, 4))],
)
def test_what_does_not_fit_is_refused(clip: tuple[int, ...], flow_shape: tuple[int, ...]) -> None:
    with refused("flicker.shape", str(list(clip)), str(list(flow_shape))):
        temporal(torch.zeros(clip), torch.zeros(clip), torch.zeros(flow_shape))
