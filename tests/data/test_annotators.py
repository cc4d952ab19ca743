"""Flow by DIS and by RAFT: backwards in time, across the seams of reads, from local weights alone."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.optical_flow import raft_small

from owl.data import annotators, codecs
from owl.data.annotators import FlowAnnotator, depth_levels, depth_scale, load_raft, raft_flow
from owl.data.flow import estimate_flow
from owl.data.source import Source
from owl.pixels import DepthScale
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset

SIZE = (64, 96)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    root = make_dataset(tmp_path_factory.mktemp("flow") / "data", 3, 5, SIZE, ("rgb", "flow"))
    return Source.open(str(root), ("rgb",), ())


def flows(annotator: FlowAnnotator, source: Source, episode: int = 0) -> np.ndarray:
    return np.stack([codecs.decode_flow(members["flow.png"]) for members in annotator.members(source, episode)])


@pytest.mark.parametrize("together", [1, 2, 16])
def test_dis_is_computed_across_the_seams_of_reads(
    source: Source, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlowAnnotator, "together", together)
    found = flows(FlowAnnotator(SIZE), source)
    (frames,) = annotators.pictures(source, 0, 5)
    assert found.shape == (5, 32, 48, 2)
    assert not found[0].any()
    for frame in range(1, 5):
        expected = codecs.decode_flow(codecs.encode_flow(estimate_flow(frames[frame - 1], frames[frame], 2)))
        np.testing.assert_array_equal(found[frame], expected)


class Displaced(nn.Module):
    """In place of RAFT: returns the mean of the first image minus that of the second, as flow of every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        height, width = first.shape[-2:]
        assert height % 8 == width % 8 == 0
        assert min(height, width) >= 128
        difference = (first - second).mean((1, 2, 3)).view(-1, 1, 1, 1)
        return [torch.full_like(first[:, :2], torch.nan), difference.expand(-1, 2, height, width)]


def test_raft_gets_the_later_frame_first_in_sides_that_it_takes() -> None:
    frames = np.stack([np.full((36, 50, 3), value, np.uint8) for value in (0, 51, 255)])
    found = raft_flow(Displaced(), frames, 2)
    assert found.shape == (2, 18, 25, 2)
    np.testing.assert_allclose(found[:, 0, 0, 0], [0.4, 1.6], atol=1e-5)


def test_raft_is_read_from_a_file_in_every_process(source: Source, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = raft_small(weights=None)
    torch.save(network.state_dict(), tmp_path / "raft.pth")
    annotator = pickle.loads(pickle.dumps(FlowAnnotator(SIZE, str(tmp_path / "raft.pth"))))
    assert annotator.modalities["flow"]["made_by"]["path"] == str(tmp_path / "raft.pth")
    frames = next(annotators.pictures(source, 0, 2))
    one, other = (torch.from_numpy(frame).movedim(-1, 0)[None] / 127.5 - 1 for frame in frames)
    one, other = (nn.functional.pad(image, (0, 32, 0, 64), mode="replicate") for image in (one, other))
    with torch.no_grad():
        expected = network.eval()(other, one)[-1][..., :64, :96]
    (found,) = annotator.estimate(frames)
    np.testing.assert_allclose(found[5, 7], expected[0, :, 10:12, 14:16].mean((1, 2)), atol=1e-3)


def test_raft_without_its_weights_is_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.pth")
    with refused("flow.weights", missing, "--flow_weights"):
        load_raft(missing)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "damaged.pth").write_bytes(b"damaged")
    for name in ("other.pth", "damaged.pth"):
        with refused("flow.weights", name, "raft_large"):
            load_raft(str(tmp_path / name))


def test_flow_that_is_not_finite_is_refused(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    annotator = FlowAnnotator(SIZE)
    annotator.weights = "raft.pth"
    nan = [np.full((32, 48, 2), np.nan, np.float32)] * 4
    monkeypatch.setattr(FlowAnnotator, "estimate", lambda self, frames: nan)
    with refused("flow.non-finite", "raft.pth", "episode-000", source.url):
        flows(annotator, source)


def test_inverse_distances_become_levels_and_come_back() -> None:
    rng = np.random.default_rng(0)
    inverse = rng.uniform(0.01, 1.0, (40, 50))
    inverse[0, 0] = np.nan
    scale = depth_scale(inverse.ravel(), "x")
    levels = depth_levels(inverse, scale["step"], scale["offset"], inverse.shape)
    assert levels[0, 0] == 0
    assert levels[1:].min() == 1
    assert levels.max() == 255
    distance = DepthScale.of(scale, "x").distance(torch.from_numpy(levels) / 255).numpy()
    inside = (levels > 1) & (levels < 255)
    np.testing.assert_allclose(1 / distance[inside], inverse[inside], atol=0.6 * scale["step"])
    far = depth_scale(np.array([1e-9, 1.0]), "x")
    assert DepthScale.of(far, "x").far == pytest.approx(100 * DepthScale.of(far, "x").near, rel=1e-3)


@pytest.mark.parametrize("samples", [[], [np.nan, np.nan], [0.0, 0.0], [2.0, 2.0]])
def test_depth_that_says_nothing_is_refused(samples: list[float]) -> None:
    with refused("depth.constant", "scenes"):
        depth_scale(np.array(samples), "scenes")


def test_levels_are_resized_but_what_is_not_measured_does_not_spread() -> None:
    inverse = np.ones((4, 6))
    inverse[:, :3] = np.nan
    levels = depth_levels(inverse, 0.01, 10.0, (8, 12))
    assert levels.shape == (8, 12)
    assert not levels[:, :6].any()
    assert (levels[:, 6:] == 90).all()
    assert depth_levels(inverse, 0.01, 10.0, (2, 3)).tolist() == [[0, 90, 90]] * 2
