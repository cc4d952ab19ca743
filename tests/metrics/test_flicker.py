"""Flicker: nothing for the truth, twice the variance of independent noise; blur has less, or along the flow none."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from owl.metrics.flicker import Flicker, FlickerAlongFlow
from tests.helpers.errors import refused


def moving(clips: int = 2) -> Tensor:
    """float[clips, 6, 3, 32, 48] in [0, 1]: a texture that slides by a pixel a frame."""
    texture = torch.rand(clips, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    return torch.stack([texture.roll(shift, -1) for shift in range(6)], 1)


def measured(generated: Tensor, true: Tensor) -> tuple[float, float]:
    metric = Flicker()
    metric.update(generated, true)
    values = metric.compute()
    return float(values["flicker"]), float(values["flicker_true"])


def test_the_truth_does_not_flicker_however_it_moves() -> None:
    excess, true = measured(moving(), moving())
    assert excess == 0
    assert true > 0.01


def test_independent_noise_adds_twice_its_variance() -> None:
    still = torch.full((2, 20, 3, 32, 48), 0.5)
    noise = 0.1 * torch.randn(still.shape, generator=torch.Generator().manual_seed(1))
    excess, true = measured(still + noise, still)
    assert true == 0
    assert excess == pytest.approx(2 * 0.1**2, rel=0.01)


def test_noise_that_stays_and_light_that_changes_are_no_flicker() -> None:
    still = torch.full((1, 5, 3, 32, 48), 0.5)
    grain = 0.1 * torch.randn(1, 1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    light = torch.linspace(0, 0.3, 5)[:, None, None, None]
    assert measured(still + grain, still)[0] == pytest.approx(0, abs=1e-12)
    assert measured(still + light, still)[0] == pytest.approx(0, abs=1e-12)


def test_blur_changes_less_than_the_truth() -> None:
    true = moving()
    blurred = F.avg_pool2d(true.flatten(0, 1), 3, 1, 1).view(true.shape)
    assert measured(blurred, true)[0] < 0


def test_is_the_mean_of_the_clips_whatever_the_batches() -> None:
    true = moving(3)
    generated = true + 0.1 * torch.randn(true.shape, generator=torch.Generator().manual_seed(1))
    metric = Flicker()
    metric.update(generated[:2], true[:2])
    metric.update(generated[2:], true[2:])
    assert float(metric.compute()["flicker"]) == pytest.approx(measured(generated, true)[0], rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 3, 8, 8), (2, 3, 3, 8, 10), (3, 3, 8, 8)])
def test_what_cannot_be_compared_is_refused(shape: tuple[int, ...]) -> None:
    with refused("flicker.shape", str(list(shape))):
        Flicker().update(torch.zeros(shape), torch.zeros(2, 3, 3, 8, 8) if shape[1] > 1 else torch.zeros(shape))


def constant_flow(clip: Tensor, dx: float, dy: float, downscale: int = 2) -> Tensor:
    """float[B, T, 2, H / downscale, W / downscale]: everything was by (dx, dy) further one frame ago."""
    batch, time, _, height, width = clip.shape
    flow = torch.tensor([dx, dy]).view(1, 1, 2, 1, 1)
    return flow.expand(batch, time, 2, height // downscale, width // downscale)


def along(decoded: Tensor, true: Tensor, flow: Tensor) -> float:
    metric = FlickerAlongFlow()
    metric.update(decoded, true, flow)
    return float(metric.compute())


def noise(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_along_the_flow_the_truth_has_none_whether_the_flow_is_right_or_not() -> None:
    true = moving()
    assert along(true, true, constant_flow(true, -1, 0)) == 0
    assert along(true, true, constant_flow(true, 3, 2)) == 0


@pytest.mark.parametrize("shift", [(0, 0), (2, 0), (0, -3), (-1, 2)])
def test_along_the_flow_independent_noise_has_twice_its_variance_however_the_scene_moves(
    shift: tuple[int, int],
) -> None:
    dx, dy = shift
    texture = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    true = torch.stack([texture.roll((-dy * frame, -dx * frame), (-2, -1)) for frame in range(16)], 1)
    flickering = along(true + noise(true.shape), true, constant_flow(true, dx, dy))
    assert flickering == pytest.approx(2 * 0.1**2, rel=0.02)


def test_along_the_flow_detail_that_moves_with_the_scene_has_none_and_dirt_on_the_lens_has_some() -> None:
    true = moving()
    flow = constant_flow(true, -1, 0)
    grain = noise((2, 3, 32, 48))
    sticking = torch.stack([grain.roll(frame, -1) for frame in range(6)], 1)
    assert along(true + sticking, true, flow) < 1e-8
    assert along(true + grain[:, None], true, flow) > 0.1**2
    blurred = F.avg_pool2d(true.flatten(0, 1), 3, 1, 1).view(true.shape)
    inner = (..., slice(2, -2), slice(8, -8))  # where no border and nothing that was rolled around is near
    assert along(blurred[inner], true[inner], constant_flow(true[inner], -1, 0)) < 1e-3
    assert measured(blurred, true)[0] < -0.01


def test_along_the_flow_motion_by_parts_of_a_pixel_and_on_a_coarse_grid_is_followed() -> None:
    fine = F.interpolate(
        torch.rand(1, 3, 16, 100, generator=torch.Generator().manual_seed(0)), (32, 800), mode="bicubic"
    )

    def slide(content: Tensor) -> Tensor:
        """By a pixel and a half a frame, without aliasing: every fourth column."""
        return torch.stack([content[..., 100 - 6 * frame : 740 - 6 * frame : 4] for frame in range(4)], 1)

    true = slide(fine)
    errors = slide(0.3 * fine.roll(16, -2))
    for downscale in (1, 2, 4):
        followed = along(true + errors, true, constant_flow(true, -1.5, 0, downscale))
        assert followed < 0.1 * along(true + errors, true, constant_flow(true, 0, 0, downscale))


def test_along_the_flow_what_was_hidden_or_outside_does_not_count() -> None:
    true = torch.rand(1, 2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    true[:, 1, :, :, :24] = true[:, 0, :, :, :24]  # the right half is another scene
    wrong = true.clone()
    wrong[:, 1, :, :, 24:] += noise((1, 3, 32, 24))
    assert along(wrong, true, constant_flow(true, 0, 0)) < 1e-4
    still = torch.full((1, 2, 3, 32, 48), 0.5)
    edge = still.clone()
    edge[:, 1, :, :, 40:] += noise((1, 3, 32, 8))  # came into view
    assert along(edge, still, constant_flow(still, 8, 0)) == 0
    assert along(edge, still, constant_flow(still, 6, 0)) > 1e-4


def test_along_the_flow_every_pixel_counts_alike_whatever_the_batches_and_the_size_may_be_odd() -> None:
    true = moving(3)[..., :31, :45]
    decoded, flow = true + noise(true.shape), constant_flow(true, -1, 0, 1)
    metric = FlickerAlongFlow()
    metric.update(decoded[:2], true[:2], flow[:2])
    metric.update(decoded[2:], true[2:], flow[2:])
    assert float(metric.compute()) == pytest.approx(along(decoded, true, flow), rel=1e-5)


@pytest.mark.parametrize(
    ("clip", "flow"),
    [((2, 1, 3, 8, 8), (2, 1, 2, 4, 4)), ((2, 3, 3, 8, 8), (2, 2, 2, 4, 4)), ((2, 3, 3, 8, 8), (2, 3, 3, 4, 4))],
)
def test_along_the_flow_what_does_not_fit_is_refused(clip: tuple[int, ...], flow: tuple[int, ...]) -> None:
    with refused("flicker.shape", str(list(clip)), str(list(flow))):
        FlickerAlongFlow().update(torch.zeros(clip), torch.zeros(clip), torch.zeros(flow))


def test_along_the_flow_each_frame_follows_its_own_flow_and_light_that_changes_is_no_flicker() -> None:
    shifts = torch.tensor([0, 1, 4, -2, 3])  # pixels to the right since the frame before
    still, grain = torch.full((1, 5, 3, 32, 48), 0.5), noise((3, 32, 48))
    sticking = torch.stack([grain.roll(int(shifts[: frame + 1].sum()), -1) for frame in range(5)])[None]
    flow = torch.zeros(1, 5, 2, 32, 48)
    flow[:, :, 0] = -shifts[:, None, None]
    rolled_around = (..., slice(8, -8))  # what came back on the other side is outside
    assert along((still + sticking)[rolled_around], still[rolled_around], flow[rolled_around]) < 1e-8
    light = torch.linspace(0, 0.3, 5)[:, None, None, None]
    assert along(still + light, still, torch.zeros_like(flow)) < 1e-12
