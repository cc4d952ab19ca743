"""Poses follow what is done to pictures: reprojections still agree."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from owl.data.geometry import Camera, reproject
from owl.data.modalities.base import Sampling
from owl.data.modalities.pose import Pose
from owl.data.scan import write_index
from owl.data.shards import DatasetInfo, ShardWriter
from owl.data.windows import WindowDataset

SIZE, FRAMES = (24, 42), 7


@pytest.fixture
def walk(tmp_path: Path) -> Path:
    """A camera that walks and turns."""
    DatasetInfo(35.0, SIZE, {"pose": {"extension": "pose.npy"}}, {"train": ["a"]}, {}, "test").save(tmp_path)
    with ShardWriter(tmp_path, 0) as writer:
        for t in range(FRAMES):
            pose = np.array([100 + 5 * t, 7 * t, 41, 30 + 4 * t, t, 20, 24, 21, 12 - t], np.float32)
            writer.write("a", t, {"pose.npy": Pose.encode(pose)})
    write_index(tmp_path)
    return tmp_path


def places(sample: dict[str, Tensor], depth: Tensor) -> Tensor:
    """float[H, W, 2], where the pixels of the first frame are in the last, for float[H, W]."""
    first, last = (Camera(sample["pose"][[t]], sample["intrinsics"][[t]]) for t in (0, -1))
    return reproject(depth[None], first, last)[0][0]


def window(walk: Path, item: int | tuple[int, int] = 0, **arguments: Any) -> dict[str, Tensor]:
    return WindowDataset(walk, modalities=("pose",), length=5, **arguments)[item]


def test_a_pose_is_absolute_and_follows_the_stride(walk: Path) -> None:
    windows = WindowDataset(walk, modalities=("pose",), length=3, stride=2)
    sample = windows[1]
    assert sample["pose"].tolist() == [[100 + 5 * t, 7 * t, 41, 30 + 4 * t, t] for t in (1, 3, 5)]
    assert sample["intrinsics"].tolist() == [[20, 24, 21, 12 - t] for t in (1, 3, 5)]


def test_reprojection_agrees_in_cropped_pictures(walk: Path) -> None:
    depth = torch.rand(SIZE, generator=torch.Generator().manual_seed(0)) * 100 + 50
    expected = places(window(walk), depth)[4:20, 11:31] - torch.tensor([11.0, 4.0])
    assert torch.allclose(places(window(walk, crop=(16, 20)), depth[4:20, 11:31]), expected, atol=1e-3)


def test_reprojection_agrees_in_mirrored_pictures(walk: Path) -> None:
    depth = torch.rand(SIZE, generator=torch.Generator().manual_seed(0)) * 100 + 50
    expected = places(window(walk), depth).flip(1) * torch.tensor([-1.0, 1]) + torch.tensor([42.0, 0])
    assert torch.allclose(places(window(walk, (0, 3), flip=1.0), depth.flip(1)), expected, atol=1e-3)
    cropped, both = window(walk, (0, 3), crop=(16, 20)), window(walk, (0, 3), crop=(16, 20), flip=1.0)
    assert torch.equal(both["intrinsics"][:, 2], 20 - cropped["intrinsics"][:, 2])  # of the same crop


def test_reprojection_agrees_in_smaller_pictures(walk: Path) -> None:
    depth = torch.rand(SIZE, generator=torch.Generator().manual_seed(0)) * 100 + 50
    middle = (slice(1, None, 3), slice(1, None, 3))  # pixels whose centres are those of the smaller picture's
    expected = places(window(walk), depth)[middle] / 3
    assert torch.allclose(places(window(walk, size=(8, 14)), depth[middle]), expected, atol=1e-3)


def test_a_pose_that_is_no_number_is_damaged() -> None:
    pose = Pose("pose", {}, Sampling("data", 35.0, SIZE))
    assert pose.decode(Pose.encode(np.ones(9, np.float32))).tolist() == [1] * 9
    for wrong in (np.full(9, np.nan, np.float32), np.ones(8, np.float32)):
        with pytest.raises(ValueError, match=r"NaN|shape \[8\]"):
            pose.decode(Pose.encode(wrong))
