"""Depth and pose say where each pixel was: on real frames of the game, and by the equations."""

import math
from pathlib import Path

import pytest
import torch

from owl.data import game
from owl.data.geometry import Camera, agrees, backproject, map_units, project, reproject, seen_from, warp
from owl.data.modalities.depth import Depth
from owl.data.modalities.labels import Labels
from owl.data.modalities.pose import Pose
from tests.helpers.camera import footage, look_about, reprojection_gain

SIZE = (96, 160)


def test_frames_are_seen_again_among_things_that_move() -> None:
    frames = game.play("deathmatch", 60, SIZE, seed=1, buffers=("depth", "labels"), variables=Pose.variables)
    recorded = ((f.rgb, *(kind.record(f, f) for kind in (Depth, Pose, Labels))) for f in frames)
    shown = footage(((rgb, depth, pose, labels[0]) for rgb, depth, pose, labels in recorded), SIZE)
    gain, share = reprojection_gain(shown)
    assert gain >= 2
    assert share > 0.6  # much is farther away than the depth buffer reaches


def test_looking_up_and_down_is_a_shear(tmp_path: Path) -> None:
    shown = look_about(tmp_path, SIZE, 40)
    assert shown.camera.pose[:, 4].abs().max() > 5
    gain, share = reprojection_gain(shown)
    assert gain >= 3.8  # with square pixels, or a picture plane that tilts, it is below 3.5
    assert share > 0.8


def camera(x: float = 0, y: float = 0, z: float = 41, angle: float = 0) -> Camera:
    return Camera(torch.tensor([[x, y, z, angle, 0]]), torch.tensor([[80.0, 96, 80, 48]]))


def test_a_camera_looks_along_its_angle() -> None:
    east, north = camera(), camera(angle=90)
    assert torch.allclose(east.rotation()[0, :, 2], torch.tensor([1.0, 0, 0]), atol=1e-6)
    assert torch.allclose(north.rotation()[0, :, 2], torch.tensor([0.0, 1, 0]), atol=1e-6)
    assert torch.allclose(east.rotation()[0, :, 0], torch.tensor([0.0, -1, 0]), atol=1e-6)
    pose = camera(3, 4, 5, 30).camera_to_world()[0]
    assert torch.linalg.det(pose).item() == pytest.approx(1)
    assert pose[:, 3].tolist() == [3, 4, 5, 1]


def test_points_in_front_are_seen_where_a_pinhole_shows_them() -> None:
    points = torch.tensor([[[[100.0, -50, 41], [100, 0, 91], [200, 100, 41]]]])  # to the right, above, to the left
    places, distance = project(points, camera())
    assert places[0, 0].tolist() == [[120, 48], [80, 0], [40, 48]]
    assert distance[0, 0].tolist() == [100, 100, 200]
    homogeneous = camera().matrix()[0] @ torch.tensor([50.0, 0, 100])  # the first point in camera coordinates
    assert (homogeneous[:2] / homogeneous[2]).tolist() == [120, 48]


def test_reprojecting_onto_itself_changes_nothing() -> None:
    depth = torch.rand(1, *SIZE) * 500 + 20
    view = camera(10, 20, 30, 77)
    places, distance = reproject(depth, view, view)
    y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in SIZE), indexing="ij")
    assert torch.allclose(places[0], torch.stack([x, y], -1), atol=1e-2)
    assert torch.allclose(distance, depth, atol=1e-2)
    picture = torch.rand(1, 3, *SIZE)
    assert torch.allclose(warp(picture, torch.stack([x, y], -1)[None]), picture, atol=1e-4)
    assert agrees(depth, view, depth, view, 1e-1)[0, 1:-1, 1:-1].all()


def test_turning_left_moves_the_picture_right_and_hidden_things_disagree() -> None:
    depth = torch.full((1, *SIZE), 100.0)
    places, _ = reproject(depth, camera(), camera(angle=10))
    assert places[0, 48, 80, 0].item() == pytest.approx(80.5 + 80 * math.tan(math.radians(10)), abs=1)
    nearer = torch.full((1, *SIZE), 50.0)
    assert not agrees(depth, camera(), nearer, camera(), 10).any()
    behind = camera(x=200)
    assert not agrees(depth, camera(), depth, behind, 1e9).any()  # what lies behind it is not seen
    assert backproject(depth, camera())[0, 48, 80].tolist() == pytest.approx([100, -0.625, 41 - 0.5 / 0.96], abs=1e-3)


def test_depth_is_seen_from_where_the_camera_went() -> None:
    depth = torch.rand(1, *SIZE, generator=torch.Generator().manual_seed(0)) * 500 + 20
    view = camera(10, 20, 30, 77)
    torch.testing.assert_close(seen_from(depth, view, view), depth, atol=1e-2, rtol=0)
    wall = torch.full((1, *SIZE), 100.0)
    for step in (0.5, 20, 60):  # also where its pixels come apart
        torch.testing.assert_close(seen_from(wall, camera(), camera(x=step)), wall - step)
    assert seen_from(wall, camera(), camera(x=200)).isinf().all()  # behind it
    turned = seen_from(wall, camera(), camera(angle=45))[0]
    assert turned[:, :70].isinf().all()  # to the left of what was seen
    assert turned[12:84, 90:150].isfinite().all()


def test_the_nearest_surface_hides_the_others_and_the_unknown_hides_nothing() -> None:
    depth = torch.full((1, *SIZE), 200.0)
    depth[..., 80:] = 50
    seen = seen_from(depth, camera(), camera(y=-20))[0, 48]  # to the right: the near half moves left in front
    assert seen[:46].tolist() == [200] * 46
    assert seen[50:126].tolist() == [50] * 76
    depth[..., 80:] = torch.inf
    seen = seen_from(depth, camera(), camera(y=-20))[0, 48]
    assert seen[:70].tolist() == [200] * 70
    assert seen[74:].isinf().all()


def test_levels_of_depth_become_map_units() -> None:
    depth = torch.tensor([0.0, 100, 200]) / 255
    found = map_units(depth, {"step": 1 / 0.14, "offset": 1.2})
    assert found.tolist() == pytest.approx([1.2 / 0.14, 101.2 / 0.14, 201.2 / 0.14])
