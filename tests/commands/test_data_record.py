"""The command line of the recorder."""

from pathlib import Path

import pytest

from owl.__main__ import run
from owl.data import game
from owl.data.shards import DatasetInfo, ShardIndex
from owl.play.log import ActionLog
from tests.helpers.errors import refused
from tests.helpers.tiny import owl_here


def test_a_recording_ends_with_what_it_made_and_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a game"
    command = ["data", "record", str(path), "--frames=30", "--size=48x80", "--seed=2", "--depth", "--workers=1"]
    assert run([*command]) == 0
    shown = capsys.readouterr()
    assert f"{path} holds 30 frames (" in shown.out
    assert f"python -m owl data inspect '{path}'" in shown.out
    assert "30/30" in shown.err  # the progress bar counts frames
    info = DatasetInfo.load(path)
    assert (info.size, list(info.modalities), info.source["seed"]) == ((48, 80), ["rgb", "depth", "controls"], 2)
    assert ShardIndex.load(path).episode_frames.sum() == 30
    assert run([*command]) == 0
    assert f"{path} holds 30 frames\n" in capsys.readouterr().out  # nothing was recorded, so there is no rate


@pytest.mark.usefixtures("recorded_here")
def test_camera_and_labels_are_recorded_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "seen"
    assert run(["data", "record", str(path), "--frames=9", "--size=48x80", "--pose", "--labels", "--workers=1"]) == 0
    info = DatasetInfo.load(path)
    assert list(info.modalities) == ["rgb", "pose", "labels", "controls"]
    assert {"Wall", "FloorCeilingSky"} <= set(info.modalities["labels"]["names"])


@pytest.mark.parametrize(
    ("option", "code", "tokens"),
    [
        ("--size=48", "arguments.size", ["--size is 48", "96x160"]),
        ("--scenario=deathmach", "game.scenario", ["'deathmach'", "did you mean 'deathmatch'?"]),
        ("--farmes=30", "arguments.unknown-key", ["--farmes", "did you mean '--frames'?"]),
    ],
)
def test_mistakes_are_reported_before_anything_is_written(
    tmp_path: Path, option: str, code: str, tokens: list[str]
) -> None:
    with refused(code, *tokens):
        run(["data", "record", str(tmp_path / "game"), option])
    assert not (tmp_path / "game").exists()


@pytest.mark.usefixtures("recorded_here")
def test_several_scenarios_are_recorded_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        run(
            [
                "data",
                "record",
                "both",
                "--frames=12",
                "--size=48x80",
                "--scenario",
                "basic,freedoom2:MAP02",
                "--held_out=0.4",
            ]
        )
        == 0
    )
    assert {split: len(names) for split, names in DatasetInfo.load("both").splits.items()} == {
        "train": 2,
        "validation": 2,
        "test": 2,
    }
    assert run(["data", "inspect", "both"]) == 0
    assert "basic, freedoom2:MAP02" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("origin", "arguments", "code", "tokens"),
    [
        ({"kind": "world model"}, (), "actions.origin", ["world model", "play --game"]),
        ({"kind": "game", "scenario": "deathmatch", "vizdoom": "0.1"}, (), "actions.other-game", ["0.1"]),
        ({}, ("--frames", "90"), "arguments.actions", ["--frames is 90", "--actions"]),
        ({}, ("--seed", "3"), "arguments.actions", ["--seed is 3"]),
    ],
)
def test_logs_that_cannot_be_recorded_are_reported(
    tmp_path: Path, origin: dict[str, str], arguments: tuple[str, ...], code: str, tokens: list[str]
) -> None:
    ActionLog(origin, list(game.BUTTONS), list(game.AXES), 0, 0).save(tmp_path / "log.jsonl")
    with refused(code, *tokens):
        owl_here("data", "record", "d", "--actions", "log.jsonl", *arguments, cwd=tmp_path)
    assert not (tmp_path / "d").exists()
