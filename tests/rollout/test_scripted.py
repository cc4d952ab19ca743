"""What is measured under scripted controls, by closed forms; and what the real game shows under them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from owl.data import game
from owl.data.continued import RecordedGame
from owl.data.recorder import GameRecording, record_game
from owl.data.shards import DatasetInfo
from owl.data.windows import WindowDataset
from owl.losses.lpips import LPIPS
from owl.rollout.inverse_dynamics import InverseDynamicsReader
from owl.rollout.scripted import GameTruth, Scripted, control_metrics, followed, revisit_metrics
from owl.rollout.scripts import Move, Script
from tests.helpers.errors import refused
from tests.helpers.latents import make_latents
from tests.helpers.rollouts import Painted

GIVEN = torch.tensor([0.0, 0, 1, 1, 1, 0, 0])


def test_a_control_that_is_read_as_given_is_followed_at_once() -> None:
    assert followed(GIVEN, GIVEN.expand(2, -1)) == {"accuracy": 1, "latency": 0, "missed": 0}
    turned = followed(-GIVEN, GIVEN.expand(2, -1))  # to the other side
    assert turned == {"accuracy": 0.5, "missed": 1}


def test_latency_counts_frames_and_what_is_never_read_is_missed() -> None:
    late = torch.tensor([0.0, 0, 0, 1, 1, 1, 0])
    found = followed(GIVEN, torch.stack([late, GIVEN, torch.zeros(7)]))
    assert found["latency"] == 0.5
    assert found["missed"] == pytest.approx(1 / 3)
    assert found["accuracy"] == pytest.approx(((2 + 3 + 0) / 9 + (3 + 4 + 4) / 12) / 2)
    assert followed(GIVEN, torch.ones(1, 7))["accuracy"] == 0.5  # always down
    again = torch.tensor([0.0, 1, 0, 0, 1])
    assert followed(again, torch.tensor([[0.0, 0, 0, 0, 1]]))["latency"] == 3  # also the frames between two presses


def test_each_control_of_a_script_is_read_from_the_generated_frames_and_from_those_of_the_game() -> None:
    script = Script("both", (Move(1), Move(2, ("fire",), {"y": 12.0})))
    buttons, axes = script.played(Painted.buttons, Painted.axes, 1.0)
    game_frames = torch.zeros(2, 3, 3, 8, 8, dtype=torch.uint8)
    game_frames[:, 1:, 0], game_frames[:, 1:, 1] = 255, 6
    late = game_frames.clone()
    late[:, 1] = 0
    late[1, :, 0] = 0  # never pressed in the second rollout
    before = game_frames[:, 1:]  # what came before does not count
    reader = InverseDynamicsReader(Painted(), 1.0)  # type: ignore[arg-type]
    found = control_metrics(Scripted(script, 1, buttons, axes, before, late, game_frames), reader)
    assert found == pytest.approx(
        {
            "script_both_fire_accuracy": (1 / 4 + 1) / 2,
            "script_both_fire_latency": 1,
            "script_both_fire_missed": 0.5,
            "script_both_y_accuracy": (1 / 2 + 1) / 2,
            "script_both_y_latency": 1,
            "script_both_y_missed": 0,
            "script_both_y_moved": 6,
            "script_both_fire_accuracy_true": 1,
            "script_both_fire_latency_true": 0,
            "script_both_fire_missed_true": 0,
            "script_both_y_accuracy_true": 1,
            "script_both_y_latency_true": 0,
            "script_both_y_missed_true": 0,
            "script_both_y_moved_true": 12,
        }
    )
    slow = InverseDynamicsReader(Painted(), 7.0)  # type: ignore[arg-type]  # the axis moves by 6, which is read as none
    left = control_metrics(Scripted(script, 1, buttons, axes, before, late, game_frames), slow)
    assert left == {n: v for n, v in found.items() if "_y_" not in n or "_moved" in n}


def loop(generated: Tensor, true: Tensor | None = None) -> Scripted:
    length = generated.shape[1]
    script = Script("around", (Move(1), Move(1, axes={"mouse_x": 360.0})), returns=True)
    return Scripted(script, 2, torch.zeros(length, 1), torch.zeros(length, 1), generated[:, :1], generated, true)


def test_a_world_that_returns_differs_from_one_that_stands_still_or_goes_elsewhere() -> None:
    noise = torch.Generator().manual_seed(0)
    places = torch.randint(0, 256, (3, 3, 32, 48), generator=noise, dtype=torch.uint8)
    returning = places[[0, 0, 1, 1, 2, 0]][None]
    elsewhere, still = places[[0, 0, 1, 1, 2, 1]][None], places[[0] * 6][None]
    lpips = LPIPS()
    found = [revisit_metrics(loop(clip, returning), lpips) for clip in (returning, elsewhere, still)]
    assert [values["revisit_around_frames"] for values in found] == [4, 4, 4]
    returns, away, frozen = ([values[f"revisit_around_{kind}"] for kind in ("lpips", "away_lpips")] for values in found)
    assert returns[0] == pytest.approx(0, abs=1e-6)
    assert returns[1] > 0.02
    assert away[0] > 0.02
    assert frozen == pytest.approx([0, 0], abs=1e-6)
    assert found[1]["revisit_around_lpips_true"] == pytest.approx(0, abs=1e-6)
    assert found[1]["revisit_around_game_lpips"] == pytest.approx(away[0])
    assert set(revisit_metrics(loop(still), lpips)) == {
        f"revisit_around_{n}" for n in ("frames", "lpips", "away_lpips")
    }


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "data"
    record_game(str(folder), GameRecording(frames=36, size=(48, 64), scenario="basic", workers=1))
    return folder


def test_the_game_continues_from_a_recorded_frame_under_a_script(recorded: Path) -> None:
    """As recorded up to the context's end, and then as the script says: a turn, with two tics a frame."""
    dataset = WindowDataset(recorded, "test", ["rgb", "controls"], length=4, stride=2)
    windows = dataset.batch([0])
    place = dataset.describe(0)
    script = Script("turn", (Move(0.01), Move(0.12, axes={"mouse_x": 12.0})))
    frames = GameTruth(RecordedGame.find(str(recorded)), dataset, windows, 2).frames(script)
    assert frames.shape == (1, 3, 3, 48, 64)
    controls = np.zeros((6, 6))
    controls[2:, -1] = 3
    last = place["frames"][0] + 2
    again = list(RecordedGame.find(str(recorded)).play(place["episode"], last, controls))
    stored = WindowDataset(recorded, "test", ["rgb", "controls"], length=last + 1).batch([0])
    for frame, rgb, axes in zip(again, stored["rgb"][0], stored["axes"][0], strict=False):
        assert np.abs(frame.rgb.astype(int) - rgb.movedim(0, -1).numpy()).mean() < 5  # stored as JPEG
        assert frame.axes == pytest.approx(axes.numpy())
    assert [float(frame.axes[0]) for frame in again[last + 1 :]] == [0, 0, 3, 3, 3, 3]
    for found, frame in zip(frames[0], again[last + 2 :: 2], strict=True):
        assert np.array_equal(found.movedim(0, -1).numpy(), frame.rgb)
    windows["axes"] += 1
    with refused("game.replay", "other controls"):
        GameTruth(RecordedGame.find(str(recorded)), dataset, windows, 2).frames(script)


def test_what_cannot_be_replayed_is_reported(recorded: Path, tmp_path: Path) -> None:
    with refused("game.replay", "synthetic", "random policy"):
        RecordedGame.find(str(make_latents(tmp_path / "latents")))
    info = DatasetInfo.load(recorded)
    info.source["vizdoom"] = "0.1"
    info.save(tmp_path / "old")
    with refused("game.replay", "ViZDoom 0.1", game.installed_version()):
        RecordedGame.find(str(tmp_path / "old"))
    info = DatasetInfo.load(recorded)
    info.source = {"kind": "scenes", "path": str(recorded)}  # of a shared world: pieces of episodes
    info.save(tmp_path / "scenes")
    with refused("game.replay", "is from scenes"):
        RecordedGame.find(str(tmp_path / "scenes"))
    with refused("game.replay", "episode-000001-1", "restarted"):
        next(RecordedGame.find(str(recorded)).play("episode-000001-1", 3, np.zeros((2, 6))))


def test_without_the_game_it_is_reported_and_other_footage_does_not_need_it(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vizdoom", None)  # as where it is not installed
    with refused("game.package", "pip install vizdoom"):
        RecordedGame.find(str(recorded))
    with refused("game.replay", "synthetic"):
        RecordedGame.find(str(make_latents(tmp_path / "latents")))
