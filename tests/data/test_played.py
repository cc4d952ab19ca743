"""What a person has played becomes a dataset: the same frames, with the controls that led to them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from owl.data import game
from owl.data.played import PlayedGame, record_played
from owl.data.recorder import GameRecording
from owl.data.shards import INDEX_NAME, DatasetInfo, ShardIndex, shard_name
from owl.data.windows import WindowDataset
from tests.helpers.errors import refused

pytestmark = pytest.mark.usefixtures("recorded_here")
SIZE = (48, 64)
RECORDING = GameRecording(size=SIZE, episode_frames=20, modalities=("pose",))


@pytest.fixture(scope="module")
def played() -> list[PlayedGame]:
    """Two games."""
    chance = np.random.default_rng(0)
    controls = [np.concatenate([chance.random((n, 5)) < 0.3, chance.normal(0, 3, (n, 1))], 1) for n in (49, 30)]
    return [PlayedGame("deathmatch", seed, each.astype(np.float64)) for seed, each in enumerate(controls)]


def test_frames_and_controls_are_those_of_the_game(tmp_path: Path, played: list[PlayedGame]) -> None:
    info = record_played(str(tmp_path / "d"), RECORDING, played)
    assert info.source["played"] == [each.identity for each in played]
    assert [len(info.splits[split]) for split in ("train", "validation", "test")] == [3, 1, 1]
    assert ShardIndex.load(tmp_path / "d").episode_frames.tolist() == [17, 17, 16, 17, 14]
    windows = WindowDataset(tmp_path / "d", "train", ["rgb", "controls"], length=17, hop=17)
    batch = windows.batch([0, 1])
    found = np.concatenate([batch["buttons"].flatten(0, 1), batch["axes"].flatten(0, 1)], 1)
    expected = np.concatenate([np.zeros((1, 6)), played[0].controls[:33]]).astype(np.float32)
    assert np.allclose(found, expected, atol=1e-6)

    class Script:
        def __init__(self) -> None:
            self.controls = iter(played[0].controls)

        def act(self, x: float, y: float) -> np.ndarray:
            return next(self.controls)

    true = [frame.rgb for frame in game.play("deathmatch", 34, SIZE, seed=0, policy=Script())]
    error = np.abs(batch["rgb"].flatten(0, 1).movedim(1, -1).numpy().astype(int) - np.stack(true))
    assert error.mean() < 4  # of JPEG
    assert np.abs(np.diff(np.stack(true).astype(int), axis=0)).mean() > 6  # a frame too early or too late would be seen


def test_an_interrupted_recording_continues_with_the_same_bytes(tmp_path: Path, played: list[PlayedGame]) -> None:
    record_played(str(tmp_path), RECORDING, played)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / INDEX_NAME).unlink()
    (tmp_path / shard_name(1)).unlink()
    record_played(str(tmp_path), RECORDING, played)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    with refused("dataset.other-settings", "played"):
        record_played(str(tmp_path), RECORDING, played[::-1])
    assert DatasetInfo.load(tmp_path).source["kind"] == "vizdoom-played"


def test_what_cannot_be_recorded_is_reported(tmp_path: Path, played: list[PlayedGame]) -> None:
    short = PlayedGame("deathmatch", 0, played[0].controls[:1])
    with refused("arguments.too-small", "2 frames", "at least 3"):
        record_played(str(tmp_path / "d"), RECORDING, [short])
    with refused("game.scenario", "nowhere"):
        record_played(str(tmp_path / "d"), RECORDING, [PlayedGame("nowhere", 0, played[0].controls)])
    with refused("arguments.size", "16x64"):
        record_played(str(tmp_path / "d"), GameRecording(size=(16, 64)), played)
    for workers in (0, -1):
        with refused("arguments.too-small", f"workers is {workers}", "at least 1"):
            record_played(str(tmp_path / "d"), replace(RECORDING, workers=workers), played)
    assert not (tmp_path / "d").exists()
