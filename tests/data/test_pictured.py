"""Motion and depth as pictures, encoded by an autoencoder of pictures."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from owl.data.encoder import FrameEncoder
from owl.data.encoding import encode_dataset
from owl.data.shards import DatasetInfo
from owl.data.windows import WindowDataset
from owl.pixels import DepthScale, flow_to_picture
from tests.data.test_encoding import make_encoder
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset

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
    encoded(footage, tmp_path / "begun", ["motion_latent"], 2)
    with refused("dataset.other-settings", "motion_stride 2", "now it is 3"):
        encoded(footage, tmp_path / "begun", ["motion_latent"], 3)


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
