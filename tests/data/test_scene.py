"""Depth and cameras of MegaSAM's files: scaled to the stored frames, on one range, checked at the start."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from owl.data import codecs
from owl.data.scene import SceneAnnotator
from owl.data.source import Source
from owl.pixels import DepthScale
from tests.helpers.errors import refused
from tests.helpers.scenes import save_scenes
from tests.helpers.shards import make_dataset

SIZE = (24, 40)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    root = make_dataset(tmp_path_factory.mktemp("scene") / "data", 3, 4, SIZE, ("rgb",))
    return Source.open(str(root), ("rgb",), ())


def test_depth_and_cameras_are_those_of_the_files(source: Source, tmp_path: Path) -> None:
    scenes = save_scenes(tmp_path, source.url)
    annotator = SceneAnnotator.of(str(tmp_path), source, None)
    scale = DepthScale.of(annotator.modalities["depth"], "x")
    for episode, name in enumerate(source.index.episodes):
        scene = scenes[str(name)]
        members = list(annotator.members(source, episode))
        assert len(members) == 4
        for frame, found in enumerate(members):
            levels = codecs.decode_depth(found["depth.png"])
            assert not levels[:2, :2].any()  # not measured
            distance = scale.distance_of_level(int(levels[11, 21]))
            assert distance == pytest.approx(scene["depths"][frame, 5, 10], rel=0.01)
            camera = codecs.decode_array(found["camera.npy"])
            np.testing.assert_allclose(camera[:12].reshape(3, 4), scene["cam_c2w"][frame, :3], rtol=1e-6)
            np.testing.assert_allclose(camera[12:], [24, 22, 20, 12])  # twice those of depth maps of 12x20


def test_a_started_copy_keeps_its_range(source: Source, tmp_path: Path) -> None:
    save_scenes(tmp_path, source.url)
    existing = {"step": 0.5, "offset": 2.0, "inverse": True, "extension": "depth.png"}
    assert SceneAnnotator.of(str(tmp_path), source, existing).scale == {"step": 0.5, "offset": 2.0, "inverse": True}


def test_other_files_are_other_files(source: Source, tmp_path: Path) -> None:
    save_scenes(tmp_path, source.url)
    first = SceneAnnotator.of(str(tmp_path), source, None)
    assert SceneAnnotator.of(str(tmp_path), source, None).identity == first.identity
    save_scenes(tmp_path, source.url, seed=1)
    assert SceneAnnotator.of(str(tmp_path), source, None).identity != first.identity


@pytest.mark.parametrize(
    ("changed", "code", "tokens"),
    [
        ({"depths": None}, "scene.missing", ("no depths", "intrinsic, cam_c2w")),
        ({"depths": np.ones((3, 12, 20))}, "scene.shape", ("depths", "[3, 12, 20]", "[4, 12, 20]")),
        ({"cam_c2w": np.ones((4, 3, 4))}, "scene.shape", ("cam_c2w", "[4, 3, 4]", "[4, 4, 4]")),
        ({"cam_c2w": np.full((4, 4, 4), np.nan)}, "scene.non-finite", ("NaN",)),
        ({"depths": np.zeros((4, 12, 20))}, "depth.constant", ()),
    ],
)
def test_files_that_do_not_fit_are_refused(
    source: Source, tmp_path: Path, changed: dict[str, Any], code: str, tokens: tuple[str, ...]
) -> None:
    save_scenes(tmp_path, source.url, **changed)
    with refused(code, str(tmp_path), *tokens):
        SceneAnnotator.of(str(tmp_path), source, None)


def test_an_episode_without_a_file_is_refused(source: Source, tmp_path: Path) -> None:
    save_scenes(tmp_path, source.url)
    (tmp_path / "episode-001.npz").unlink()
    with refused("scene.missing", "episode-001.npz", "depths"):
        SceneAnnotator.of(str(tmp_path), source, None)
    (tmp_path / "episode-001.npz").write_bytes(b"damaged")
    with refused("scene.missing", "episode-001.npz"):
        SceneAnnotator.of(str(tmp_path), source, None)
