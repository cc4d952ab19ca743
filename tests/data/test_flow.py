"""Flow of windows that skip frames: the sum of all motion in between, along the way that things took."""

from pathlib import Path

import numpy as np
import pytest
import torch

from owl.data import codecs
from owl.data.scan import write_index
from owl.data.shards import DatasetInfo, ShardIndex, ShardWriter
from owl.data.windows import CorruptSampleWarning, WindowDataset
from tests.helpers.errors import refused
from tests.helpers.latents import make_latents
from tests.helpers.shards import DESCRIPTIONS, DOWNSCALE, overwrite

SIZE, FRAMES = (48, 64), 13
TURN = 0.06  # radians a frame


def positions(size: tuple[int, int] = SIZE) -> np.ndarray:
    """float[h, w, 2]: (x, y) of the centre of each cell, in pixels from the picture's centre."""
    y, x = np.mgrid[: size[0] // DOWNSCALE, : size[1] // DOWNSCALE]
    centres = (np.stack([x, y], -1) + 0.5) * DOWNSCALE - 0.5
    return centres - (np.array([size[1], size[0]]) - 1) / 2


def rotation(angle: float, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Flow back from a picture that was turned by an angle about its centre."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return positions(size) @ turn.T - positions(size)


def write(root: Path, flows: list[np.ndarray]) -> Path:
    info = DatasetInfo(30.0, SIZE, {"flow": DESCRIPTIONS["flow"]}, {"train": ["a"]}, {}, "test")
    info.save(root)
    with ShardWriter(root, 0) as writer:
        for frame, flow in enumerate(flows):
            writer.write("a", frame, {"flow.png": codecs.encode_flow(flow.astype(np.float32) if frame else 0 * flow)})
    write_index(root)
    return root


@pytest.fixture
def turning(tmp_path: Path) -> Path:
    return write(tmp_path / "turning", [rotation(TURN)] * FRAMES)


def middle(flow: torch.Tensor) -> np.ndarray:
    """[2, h, w] as [h, w, 2], without the border that comes from outside."""
    return flow.permute(1, 2, 0).numpy()[6:-6, 8:-8]


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_constant_motion_is_added_up(tmp_path: Path, stride: int) -> None:
    step = np.array([1.25, -0.5])
    root = write(tmp_path, [np.broadcast_to(step, (24, 32, 2))] * FRAMES)
    windows = WindowDataset(root, modalities=("flow",), length=3, stride=stride)
    for window in range(len(windows)):
        frames = [windows.describe(window)["frames"][0] + stride * k for k in range(3)]
        for frame, flow in zip(frames, windows[window]["flow"], strict=True):
            expected = step * min(stride, frame)  # from an episode's beginning on there is less behind
            np.testing.assert_allclose(flow.permute(1, 2, 0).numpy(), np.broadcast_to(expected, (24, 32, 2)), atol=1e-5)


@pytest.mark.parametrize("stride", [2, 4])
def test_a_rotation_is_followed_around_the_bend(turning: Path, stride: int) -> None:
    sample = WindowDataset(turning, modalities=("flow",), length=3, stride=stride)[stride]
    expected = rotation(stride * TURN)
    for flow in sample["flow"]:  # the first frame's too
        error = np.abs(middle(flow) - expected[6:-6, 8:-8]).max()
        assert error < 0.05
        assert np.abs(stride * rotation(TURN) - expected)[6:-6, 8:-8].max() > 2 * error


def test_motions_are_undone_from_the_last_to_the_first(tmp_path: Path) -> None:
    """A turn and a step do not commute."""
    step = np.array([4.0, 2.0])
    flows = [rotation(5 * TURN) if frame % 2 else np.broadcast_to(step, (24, 32, 2)) for frame in range(FRAMES)]
    sample = WindowDataset(write(tmp_path, flows), modalities=("flow",), length=2, stride=2)[1]
    turn = np.array([[np.cos(5 * TURN), np.sin(5 * TURN)], [-np.sin(5 * TURN), np.cos(5 * TURN)]])
    expected = (positions() @ turn.T + step) - positions()  # frame 3 turned, frame 2 stepped
    np.testing.assert_allclose(middle(sample["flow"][1]), expected[6:-6, 8:-8], atol=0.05)


def test_smaller_mirrored_and_cropped_pictures_are_followed_too(turning: Path) -> None:
    plain = WindowDataset(turning, modalities=("flow",), length=2, stride=3)[3]["flow"]
    small = WindowDataset(turning, modalities=("flow",), length=2, stride=3, size=(24, 32))[3]["flow"]
    np.testing.assert_allclose(middle(small[1])[1:-1], rotation(3 * TURN, (24, 32))[7:-7, 8:-8], atol=0.05)
    mirrored = WindowDataset(turning, modalities=("flow",), length=2, stride=3, flip=1.0)[3, 0]["flow"]
    assert torch.equal(mirrored, plain.flip(-1) * torch.tensor([-1.0, 1.0])[:, None, None])
    cropped = WindowDataset(turning, modalities=("flow",), length=2, stride=3, crop=(24, 32))[3]["flow"]
    assert torch.equal(cropped, plain[..., 6:18, 8:24])


def test_a_damaged_flow_between_the_frames_of_a_window_counts(turning: Path) -> None:
    overwrite(turning, ShardIndex.load(turning), 0, 4, "flow.png", b"garbage")
    windows = WindowDataset(turning, modalities=("flow",), length=2, stride=3)
    with pytest.warns(CorruptSampleWarning, match="frame 4"):
        delivered = {int(windows[window]["window"]) for window in range(len(windows))}
    # window w takes the motion of frames w - 2 to w + 3
    assert delivered == set(range(len(windows))) - {1, 2, 3, 4, 5, 6}


def test_latents_of_motion_cannot_skip_frames(tmp_path: Path) -> None:
    root = make_latents(tmp_path, modalities=("latent", "motion_latent"))
    assert len(WindowDataset(root, modalities=("motion_latent",), length=2))
    with refused("windows.stride", "motion_latent", "stride is 2"):
        WindowDataset(root, modalities=("motion_latent",), length=2, stride=2)
