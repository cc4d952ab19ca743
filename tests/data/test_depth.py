"""Depth of single frames by real, tiny networks of transformers in local folders."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from owl.data import codecs
from owl.data.annotators import pictures
from owl.data.depth import DepthAnnotator, load_depth_network
from owl.data.source import Source
from tests.helpers.depth import save_depth_network
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset

SIZE = (24, 40)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    root = make_dataset(tmp_path_factory.mktemp("depth") / "data", 3, 10, SIZE, ("rgb",))
    return Source.open(str(root), ("rgb",), ())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_depth_network(tmp_path_factory.mktemp("network")))


def test_relative_depth_is_stored_as_inverse_distance(source: Source, folder: str) -> None:
    annotator = DepthAnnotator.of(folder, source, None)
    assert annotator.is_relative
    described = annotator.modalities["depth"]
    assert described["inverse"] is True
    found = np.stack([codecs.decode_depth(members["depth.png"]) for members in annotator.members(source, 1)])
    assert found.shape == (10, *SIZE)
    assert found.min() >= 1
    assert found.std() > 5
    frames = np.concatenate(list(pictures(source, 1, 8)))
    inputs = annotator.processor(images=list(frames), return_tensors="pt")
    with torch.no_grad():
        depth = annotator.network(**inputs).predicted_depth
    depth = torch.nn.functional.interpolate(depth[:, None], SIZE, mode="bilinear")[:, 0].numpy()
    expected = np.clip(depth / described["step"] - described["offset"], 1, 255)
    np.testing.assert_allclose(found, expected, atol=0.6)


def test_a_network_of_distances_is_inverted(source: Source, folder: str) -> None:
    annotator = DepthAnnotator.of(folder, source, None)
    frames = next(pictures(source, 0, 2))
    relative = annotator.predict(frames)
    annotator.network.config.depth_estimation_type = "metric"
    assert not annotator.is_relative
    np.testing.assert_allclose(annotator.predict(frames) * relative, 1, rtol=1e-4)


def test_a_started_copy_keeps_its_range_also_in_another_process(source: Source, folder: str) -> None:
    existing = {"step": 0.5, "offset": 2.0, "inverse": True, "extension": "depth.png"}
    annotator = pickle.loads(pickle.dumps(DepthAnnotator.of(folder, source, existing)))
    assert annotator.scale == {"step": 0.5, "offset": 2.0, "inverse": True}


def test_folders_without_a_depth_network_are_refused(folder: str, tmp_path: Path) -> None:
    with refused("depth.folder", str(tmp_path), "config.json", "model.safetensors"):
        load_depth_network(str(tmp_path))
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((Path(folder) / name).read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', "utf-8")
    with refused("depth.folder", str(tmp_path)):
        load_depth_network(str(tmp_path))
    config = (Path(folder) / "config.json").read_text("utf-8")
    (tmp_path / "config.json").write_text(
        config.replace('"fusion_hidden_size": 16', '"fusion_hidden_size": 24'), "utf-8"
    )
    with refused("depth.folder", str(tmp_path)):
        load_depth_network(str(tmp_path))
