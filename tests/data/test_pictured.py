"""Motion and depth as pictures, encoded by an autoencoder of pictures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from owl.data.encoder import FrameEncoder
from owl.data.encoding import encode_dataset
from owl.data.modalities.pose import Pose
from owl.data.pictured import Pictured
from owl.data.scan import write_index
from owl.data.shards import DatasetInfo, ShardWriter
from owl.data.source import Source
from owl.data.windows import WindowDataset
from owl.pixels import DepthScale, flow_to_picture
from tests.data.test_encoding import make_encoder
from tests.helpers.errors import refused
from tests.helpers.shards import DESCRIPTIONS, encode, make_dataset

FRAMES, SIZE = 7, (32, 48)


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("pictured") / "footage", 4, FRAMES, SIZE)


def encoded(footage: Path, folder: Path, names: list[str], stride: int = 1, batch_size: int = 3) -> DatasetInfo:
    encoders = [make_encoder()] * len(names)
    return encode_dataset(encoders, str(footage), folder, names=names, batch_size=batch_size, motion_stride=stride)


@pytest.mark.parametrize("stride", [1, 3])
def test_motion_is_that_of_a_window_with_the_same_stride(footage: Path, tmp_path: Path, stride: int) -> None:
    info = encoded(footage, tmp_path / "moving", ["latent", "motion_latent"], stride)
    assert list(info.modalities) == ["latent", "motion_latent", "controls"]
    described = info.modalities["motion_latent"]
    assert (described["stride"], described["shape"]) == (stride, [4, 4, 6])
    scale, network = described["scale"], make_encoder().network
    length = FRAMES // stride
    flows = WindowDataset(footage, "train", ("flow",), length=length, stride=stride)
    found = WindowDataset(tmp_path / "moving", "train", ("motion_latent",), length=length, stride=stride)
    assert len(flows) == len(found)
    for window in range(len(flows)):
        with torch.inference_mode():
            pictures = flow_to_picture(flows[window]["flow"], scale, SIZE)
            expected = network.encode(pictures).mean  # type: ignore[operator]
        torch.testing.assert_close(found[window]["motion_latent"], expected, atol=2e-3, rtol=2e-3)
    with refused("windows.stride", "motion_latent", f"over {stride} stored frames", "stride is 2"):
        WindowDataset(tmp_path / "moving", "train", ("motion_latent",), length=2, stride=2)


def approach(folder: Path) -> Path:
    """Footage of a wall, to which the camera walks two levels of depth in a frame."""
    modalities = {name: DESCRIPTIONS[name] for name in ("rgb", "depth")} | {"pose": Pose.describe_recorded(SIZE)}
    DatasetInfo(35.0, SIZE, modalities, {"train": ["a"], "validation": [], "test": []}, {}, "test").save(folder)
    with ShardWriter(folder, 0) as writer:
        for frame in range(FRAMES):
            pose = np.array([2 * frame * DESCRIPTIONS["depth"]["step"], 0, 41, 0, 0, 24, 29, 24, 16], np.float32)
            level = np.full(SIZE, 60 - 2 * frame, np.uint8)
            picture = np.zeros((*SIZE, 3), np.uint8)
            members = {"rgb.jpg": encode("rgb", picture), "depth.png": encode("depth", level)}
            writer.write("a", frame, members | {"pose.npy": Pose.encode(pose)})
    write_index(folder)
    return folder


@pytest.mark.parametrize("delay", [2, 4])
def test_earlier_depth_is_seen_from_the_camera_of_the_frame(tmp_path: Path, delay: int) -> None:
    footage, network = approach(tmp_path / "footage"), make_encoder().network
    made = {"names": ["depth_latent"], "batch_size": 3, "depth_delay": delay / 35}
    info = encode_dataset([make_encoder()], str(footage), tmp_path / "delayed", **made)  # type: ignore[arg-type]
    described = info.modalities["depth_latent"]
    assert described["delay"] == pytest.approx(delay / 35)
    windows = WindowDataset(footage, "train", ("depth",), length=FRAMES)
    scale, own = DepthScale.of(described, "delayed"), windows[0]["depth"]
    found = WindowDataset(tmp_path / "delayed", "train", ("depth_latent",), length=FRAMES)[0]["depth_latent"]
    with torch.inference_mode():
        drawn = scale.to_picture(own).expand(-1, 3, -1, -1).clone()
        drawn[:delay] = -1  # nothing was seen so long before
        expected = network.encode(drawn).mean  # type: ignore[operator]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=2**-9)
    with refused("dataset.other-settings", "depth_delay", "missing", str(tmp_path / "delayed")):
        encode_dataset([make_encoder()], str(footage), tmp_path / "delayed", names=["depth_latent"])


def test_the_delay_is_that_of_depth_alone(footage: Path) -> None:
    source = Source.open(str(footage), ("flow", "depth"))
    delays = [Pictured.of(name, SIZE, source, 1, 0.1).delay for name in ("motion_latent", "depth_latent")]
    assert delays == [0, round(0.1 * 35)]


def test_a_delay_of_no_frame_is_refused(footage: Path) -> None:
    source = Source.open(str(footage), ("depth",))
    assert Pictured.of("depth_latent", SIZE, source, 1, 0.02).delay == 1
    with refused("arguments.too-small", "depth_delay is 0.01 s", str(footage), "35 frames", "0.02857 s"):
        Pictured.of("depth_latent", SIZE, source, 1, 0.01)


def test_depth_without_a_pose_cannot_be_delayed(footage: Path, tmp_path: Path) -> None:
    with refused("dataset.modalities", str(footage), "no pose", "rgb, depth, flow, audio, controls"):
        encode_dataset([make_encoder()], str(footage), tmp_path / "no", names=["depth_latent"], depth_delay=2.0)


def test_depth_is_drawn_grey_and_near_is_bright(footage: Path, tmp_path: Path) -> None:
    info = encoded(footage, tmp_path / "deep", ["depth_latent"])
    assert list(info.modalities) == ["depth_latent", "controls"]
    scale = DepthScale.of(info.modalities["depth_latent"], "deep")
    depth = WindowDataset(footage, "train", ("depth",), length=FRAMES)[0]["depth"]
    found = WindowDataset(tmp_path / "deep", "train", ("depth_latent",), length=FRAMES)[0]["depth_latent"]
    with torch.inference_mode():
        pictures = scale.to_picture(depth).clamp(-1, 1).expand(-1, 3, -1, -1)
        expected = make_encoder().network.encode(pictures).mean  # type: ignore[operator]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=2**-9)


def test_an_interrupted_pass_is_continued_with_the_same_stride_only(footage: Path, tmp_path: Path) -> None:
    encoded(footage, tmp_path / "started", ["motion_latent"], 2)
    with refused("dataset.other-settings", "motion_stride 2", "now it is 3"):
        encoded(footage, tmp_path / "started", ["motion_latent"], 3)


def test_what_cannot_be_drawn_is_refused(footage: Path, tmp_path: Path) -> None:
    small: FrameEncoder = make_encoder(size=(32, 32), latent_size=(4, 4))
    with refused("dataset.size", "frames of", "32x48", "32x32"):
        encode_dataset([small], str(footage), tmp_path / "out", names=["motion_latent"])
    bare = make_dataset(tmp_path / "bare", 3, 3, SIZE, ("rgb", "controls"))
    with refused("dataset.modalities", f"{bare} has no flow", "rgb, controls"):
        encode_dataset([make_encoder()], str(bare), tmp_path / "out", names=["motion_latent"])
    info = DatasetInfo.load(make_dataset(tmp_path / "unscaled", 3, 3, SIZE, ("flow",)))
    described = {name: value for name, value in info.modalities["flow"].items() if name != "scale"}
    replace(info, modalities={"flow": described}).save(tmp_path / "unscaled")
    with refused("dataset.scale", "unscaled", "scale None"):
        encode_dataset([make_encoder()], str(tmp_path / "unscaled"), tmp_path / "out", names=["motion_latent"])
    assert not (tmp_path / "out").exists()
