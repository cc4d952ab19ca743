"""Summaries count what is there, and the contact sheet shows it."""

from pathlib import Path

import numpy as np
import pytest

from owl.data.overview import (
    COLUMNS,
    SPLIT_COLOURS,
    DatasetReader,
    ModalitySummary,
    SplitSummary,
    draw_contact_sheet,
    summarize_modalities,
    summarize_splits,
)
from owl.data.shards import DatasetInfo, ShardIndex, shard_name
from owl.viz.modalities import colour_flow
from tests.helpers.shards import make_dataset, render


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("overview") / "tiny", episodes=5, frames=7)


def test_splits_and_modalities_are_counted(dataset: Path) -> None:
    reader = DatasetReader(str(dataset))
    assert summarize_splits(reader) == {
        "train": SplitSummary(3, 21, 21 / 35 / 3600),
        "validation": SplitSummary(1, 7, 7 / 35 / 3600),
        "test": SplitSummary(1, 7, 7 / 35 / 3600),
    }
    modalities = summarize_modalities(reader)
    assert list(modalities) == ["rgb", "depth", "flow", "audio", "controls"]
    assert modalities["controls"] == ModalitySummary(35, 35 * (128 + 5 * 4), "")
    assert "quality 95" in modalities["rgb"].description


def test_single_members_are_read(dataset: Path) -> None:
    reader = DatasetReader(str(dataset))
    np.testing.assert_array_equal(reader.frame("flow", 2, 3), render(2, 7, (24, 40))["flow"][3])
    assert reader.identity == DatasetInfo.load(dataset).identity(ShardIndex.load(dataset))


def test_the_sheet_shows_every_split_and_kind(dataset: Path) -> None:
    sheet = np.asarray(draw_contact_sheet(DatasetReader(str(dataset))))
    assert sheet.ndim == 3
    assert sheet.shape[1] > COLUMNS * 200
    for colour in SPLIT_COLOURS.values():  # the mark beside an episode's name
        assert (sheet == colour).all(-1).sum() > 100
    full_speed = colour_flow(np.full((1, 1, 2), (3, 3), np.float32), 3.0)[0, 0]
    assert full_speed.max() > 200


def test_fewer_kinds_leave_room_for_more_episodes(tmp_path: Path) -> None:
    heights = {}
    for modalities in (("rgb",), ("rgb", "depth", "flow", "audio")):
        root = make_dataset(tmp_path / "-".join(modalities), episodes=8, frames=2, modalities=modalities)
        heights[modalities] = draw_contact_sheet(DatasetReader(str(root))).height
    assert heights["rgb",] > 8 * 100
    assert heights["rgb", "depth", "flow", "audio"] < 2000


def test_a_corrupt_or_absent_member_leaves_an_empty_cell(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "data", episodes=3, frames=4)
    whole = np.asarray(draw_contact_sheet(DatasetReader(str(root))))
    shard = root / shard_name(1)
    shard.write_bytes(shard.read_bytes()[:10_000])
    damaged = np.asarray(draw_contact_sheet(DatasetReader(str(root))))
    assert damaged.shape == whole.shape
    assert (damaged != whole).any()


def test_the_colour_of_flow_is_its_direction() -> None:
    directions = np.array([[(1, 0), (0, 1), (-1, 0), (0, -1), (0, 0)]], np.float32)
    colours = colour_flow(directions, 1.0)[0].astype(int)
    assert len({tuple(colour) for colour in colours}) == 5
    assert np.ptp(colours[4]) == 0  # at rest: grey
    brightness = colour_flow(np.array([[(0.2, 0), (0.6, 0), (1, 0), (9, 0)]], np.float32), 1.0)[0].max(-1).astype(int)
    assert brightness[0] < brightness[1] < brightness[2] == brightness[3]
