"""Cameras follow the picture: resized, cropped and mirrored, they still project points to the same content."""

from pathlib import Path

import numpy as np
import pytest

from owl.data.modalities.base import Sampling, View
from owl.data.modalities.camera import Camera

STORED = (60, 80)


def stored(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))
    matrix = np.concatenate([rotation, rng.normal(size=(3, 1))], 1)
    return np.concatenate([matrix.ravel(), [70, 75, 41, 29]]).astype(np.float32)


def window(members: list[np.ndarray], view: View, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    modality = Camera("camera", Camera.describe(), sampling)
    arrays = {name: np.empty(shape, np.float32) for name, (shape, _) in modality.shapes().items()}
    modality.assemble((modality.decode(Camera.encode(member)) for member in members), view, arrays)
    return arrays["camera"], arrays["camera_intrinsics"]


def project(point: np.ndarray, matrix: np.ndarray, lens: np.ndarray) -> np.ndarray:
    x, y, z = np.linalg.inv(matrix)[:3] @ [*point, 1]
    return np.array([lens[0] * x / z + lens[2], lens[1] * y / z + lens[3]])


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_point_of_the_world_stays_on_its_content(mirrored: bool) -> None:
    members = [stored(0), stored(1)]
    plain = window(members, View(0, 0, *STORED, False), Sampling("x", 30, STORED, 2))
    seen = window(members, View(4, 6, 20, 24, mirrored), Sampling("x", 30, STORED, 2, resize=(30, 40), crop=(20, 24)))
    for frame in range(2):
        point = plain[0][frame, :3, :3] @ [0.3, -0.2, 2.0] + plain[0][frame, :3, 3]
        before = project(point, plain[0][frame], plain[1][frame])
        if mirrored:
            point = point * [-1, 1, 1]
        expected = before / 2 - (6, 4)
        if mirrored:
            expected[0] = 24 - expected[0]
        np.testing.assert_allclose(project(point, seen[0][frame], seen[1][frame]), expected, atol=1e-3)
        assert np.linalg.det(seen[0][frame]) == pytest.approx(1, abs=1e-4)


def test_a_camera_of_nan_or_of_another_shape_is_corrupt(tmp_path: Path) -> None:
    modality = Camera("camera", Camera.describe(), Sampling("x", 30, STORED))
    camera = stored()
    with pytest.raises(ValueError, match="shape"):
        modality.decode(Camera.encode(camera[:9]))
    camera[3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        modality.decode(Camera.encode(camera))
