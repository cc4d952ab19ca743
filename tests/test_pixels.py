"""Depth and flow as pictures: exact to and fro, bounded, and marked where nothing was measured."""

import cv2
import numpy as np
import pytest
import torch

from owl.pixels import UNKNOWN, DepthScale, flow_scale, flow_to_picture, picture_to_flow
from tests.helpers.errors import refused

SIZE = (24, 32)  # a diagonal of 40 pixels
SCALES = [DepthScale(7.143, 1.2), DepthScale(0.002, 3.0, inverse=True)]


def random_flow(fastest: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(2, *SIZE, generator=generator) * 2 * torch.pi
    speed = torch.rand(2, *SIZE, generator=generator) * fastest
    return torch.stack([speed * angle.cos(), speed * angle.sin()], 1)


def test_flow_comes_back_from_its_colours() -> None:
    flow = random_flow(4.0)
    picture = flow_to_picture(flow, 0.1, SIZE)
    assert picture.shape == (2, 3, *SIZE)
    assert picture.abs().max() <= 1
    torch.testing.assert_close(picture_to_flow(picture, 0.1), flow, atol=1e-5, rtol=1e-5)


def test_fast_flow_keeps_its_direction_at_full_saturation() -> None:
    flow = random_flow(4.0) + torch.tensor([8.0, 0.0]).view(1, 2, 1, 1)
    found = picture_to_flow(flow_to_picture(flow, 0.1, SIZE), 0.1)
    fast = flow.norm(dim=1) > 4
    torch.testing.assert_close(found.norm(dim=1)[fast], torch.full_like(found[:, 0][fast], 4.0))
    cosine = torch.cosine_similarity(found, flow)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_the_hue_is_the_direction_and_rest_is_grey() -> None:
    angles = torch.arange(0, 360, 60.0)
    flow = 4 * torch.stack([angles.deg2rad().cos(), angles.deg2rad().sin()]).view(1, 2, 1, -1)
    colours = flow_to_picture(flow, 4 / np.hypot(1, 6), (1, 6))[0].permute(1, 2, 0)
    hue = cv2.cvtColor((colours.numpy() + 1) / 2, cv2.COLOR_RGB2HSV)[0, :, 0]
    np.testing.assert_allclose(hue, angles, atol=1e-3)
    assert not flow_to_picture(torch.zeros(1, 2, 3, 4), 0.1, (3, 4)).any()


def test_flow_on_a_coarser_grid_is_interpolated_in_pixels_of_the_picture() -> None:
    coarse = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 6, 8)
    found = picture_to_flow(flow_to_picture(coarse, 0.1, SIZE), 0.1)
    torch.testing.assert_close(found, coarse[:, :, :1, :1].expand(1, 2, *SIZE))


def test_flow_keeps_its_precision_in_mixed_precision() -> None:
    """Also of a picture in bfloat16, as a network returns it there: what is lost is what it lost."""
    flow = random_flow(4.0)
    with torch.autocast("cpu", torch.bfloat16):
        picture = flow_to_picture(flow, 0.1, SIZE)
        found, rounded = picture_to_flow(picture, 0.1), picture_to_flow(picture.bfloat16(), 0.1)
    assert picture.dtype == found.dtype == rounded.dtype == torch.float32
    torch.testing.assert_close(found, flow, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rounded, picture_to_flow(picture.bfloat16().float(), 0.1))
    assert flow_to_picture(flow.bfloat16(), 0.1, SIZE).dtype == torch.bfloat16  # as the network that takes it


def test_flow_that_is_not_finite_is_unknown_there_only() -> None:
    flow = random_flow(4.0)
    flow[0, 0, 3, 5], flow[1, 1, 7, 2] = torch.nan, torch.inf
    picture = flow_to_picture(flow, 0.1, SIZE)
    unknown = (picture == UNKNOWN).all(1)
    assert unknown.nonzero().tolist() == [[0, 3, 5], [1, 7, 2]]
    assert picture.movedim(1, -1)[~unknown].abs().max() <= 1


@pytest.mark.parametrize("scale", SCALES)
def test_every_level_of_depth_comes_back_as_its_distance(scale: DepthScale) -> None:
    levels = torch.arange(1, 256)
    picture = scale.to_picture(levels / 255)
    assert {round(picture.max().item(), 4), round(picture.min().item(), 4)} == {1, -1}  # near and far
    distances = torch.tensor([scale.distance_of_level(level) for level in levels.tolist()])
    torch.testing.assert_close(scale.from_picture(picture), distances, rtol=1e-4, atol=0)
    torch.testing.assert_close(scale.distance(levels / 255), distances, rtol=1e-4, atol=0)
    assert picture[distances.argmin()] > picture[distances.argmax()]
    ratios = (distances[1:] / distances[:-1]).log() / picture.diff()
    torch.testing.assert_close(ratios, ratios[:1].expand(254), rtol=2e-2, atol=0)  # equal ratios are equal steps


def test_level_0_and_nan_are_no_depth() -> None:
    picture = SCALES[0].to_picture(torch.tensor([0.0, torch.nan, 1 / 255]))
    assert picture[:2].tolist() == [UNKNOWN, UNKNOWN]
    assert picture[2].item() == pytest.approx(1)
    assert SCALES[0].from_picture(torch.tensor([9.0, -9.0])).tolist() == pytest.approx(
        [SCALES[0].near, SCALES[0].far], rel=1e-4
    )


@pytest.mark.parametrize("described", [{}, {"step": 0, "offset": 1}, {"step": 1, "offset": -1}, {"step": "1"}])
def test_depth_without_a_scale_is_refused(described: dict) -> None:
    with refused("dataset.scale", "depth of data/x", "step"):
        DepthScale.of(described, "data/x")


@pytest.mark.parametrize("described", [{}, {"scale": 0}, {"scale": "fast"}])
def test_flow_without_a_scale_is_refused(described: dict) -> None:
    with refused("dataset.scale", "flow of data/x", "scale"):
        flow_scale(described, "data/x")
