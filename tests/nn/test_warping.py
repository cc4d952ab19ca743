"""Warping along the flow: what is at x in the current frame was at x + flow(x) in the previous one."""

import pytest
import torch

from owl.nn.warping import visibility, warp


@pytest.mark.parametrize("dx", [0, 2, -3])
@pytest.mark.parametrize("dy", [0, 1, -2])
def test_whole_pixels_are_moved_as_the_flow_says(dx: int, dy: int) -> None:
    previous = torch.rand(2, 3, 10, 14)
    flow = torch.tensor([dx, dy], dtype=torch.float32).view(1, 2, 1, 1).expand(2, 2, 5, 7)
    moved, inside = warp(previous, flow)
    rows, columns = torch.arange(10) + dy, torch.arange(14) + dx
    expected = previous[..., rows.clamp(0, 9)[:, None], columns.clamp(0, 13)]  # outside, the border is repeated
    torch.testing.assert_close(moved, expected, atol=1e-4, rtol=0)
    within = ((rows >= 0) & (rows < 10))[:, None] & ((columns >= 0) & (columns < 14))
    assert torch.equal(inside, within.expand(2, 1, 10, 14))


def test_a_coarse_grid_stands_for_the_middle_of_its_cells() -> None:
    centres = torch.arange(6) * 4 + 1.5  # of cells of four pixels, in pixels
    flow = torch.stack([0.1 * centres.expand(3, 6), torch.zeros(3, 6)])[None]
    previous = torch.arange(24.0).expand(1, 1, 12, 24)  # a ramp, so that a frame shows where it came from
    moved, _ = warp(previous, flow)
    expected = 1.1 * torch.arange(24.0)
    # torch's bicubic kernel follows a slope to a twentieth of a pixel; edges taken for middles would be 0.15 off
    torch.testing.assert_close(moved[0, 0, 5, 4:18], expected[4:18], atol=0.06, rtol=0)


def test_gradients_reach_the_frame_and_not_where_nothing_is_taken_from() -> None:
    previous = torch.rand(1, 1, 6, 8, requires_grad=True)
    flow = torch.tensor([4.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 6, 8)
    warp(previous, flow)[0].sum().backward()
    assert previous.grad is not None
    torch.testing.assert_close(previous.grad[..., :3], torch.zeros(1, 1, 6, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(previous.grad[..., 4:7], torch.ones(1, 1, 6, 3), atol=1e-4, rtol=0)


def test_visible_is_what_looks_the_same_and_was_inside() -> None:
    current = torch.rand(1, 3, 4, 5)
    warped = current.clone()
    warped[..., 0, 0] += 0.1
    warped[..., 0, 1] += 1
    inside = torch.ones(1, 1, 4, 5, dtype=torch.bool)
    inside[..., -1] = False
    seen = visibility(current, warped, inside)[0, 0]
    assert torch.equal(seen[1:, :-1], torch.ones(3, 4))
    assert float(seen[0, 0]) == pytest.approx(torch.tensor(-50 * 3 * 0.01).exp().item(), rel=1e-3)
    assert float(seen[0, 1]) < 1e-30
    assert torch.equal(seen[:, -1], torch.zeros(4))
