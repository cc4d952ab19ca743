"""Inputs of OWL Control: each event at the frame that it brought about, and recordings in every state of disrepair."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from owl.data.footage import find_footage
from owl.data.importer import import_footage
from owl.data.modalities.controls import Mirror
from owl.data.owl_control import AXES, RELEASE, Inputs, align, describe_controls, order_buttons, read_inputs
from owl.data.windows import WindowDataset
from tests.helpers.errors import refused
from tests.helpers.videos import RATE, VIDEO_START, frame_number, make_recording

W, A, D, SPACE, LEFT_CLICK = 0x57, 0x41, 0x44, 0x20, 1
TAB, ALT, RIGHT_CLICK = 0x09, 0x12, 2
HELD = {"inputs": {"keyboard": [W, 255], "mouse": [RIGHT_CLICK]}}


def key(time: float, code: int, down: bool) -> tuple[float, str, list]:
    return time, "KEYBOARD", [code, down]


def controls(tmp_path: Path, events: list[tuple[float, str, Any]], frames: int = 30) -> dict[str, np.ndarray]:
    """Column by name, of a recording of these events."""
    inputs = read_events(tmp_path, events)
    buttons = order_buttons(inputs.names)
    return dict(zip([*buttons, *AXES], align(inputs, frames, RATE, buttons).T, strict=True))


def read_events(tmp_path: Path, events: list[tuple[float, str, Any]]) -> Inputs:
    rows = sorted([(0.0, "VIDEO_START", []), *events], key=lambda row: row[0])
    text = "".join(f'{VIDEO_START + t!r},{name},"{json.dumps(a)}"\n' for t, name, a in rows)
    (tmp_path / "inputs.csv").write_text("timestamp,event_type,event_args\n" + text)
    return read_inputs(tmp_path / "inputs.csv")


def on(column: np.ndarray) -> list[int]:
    return np.flatnonzero(column).tolist()


def test_a_key_is_held_between_its_events(tmp_path: Path) -> None:
    columns = controls(tmp_path, [key(10.2 / RATE, W, True), key(14.7 / RATE, W, False)])
    assert on(columns["W"]) == [11, 12, 13, 14, 15]


def test_an_event_at_a_frames_time_belongs_to_that_frame(tmp_path: Path) -> None:
    sharp = [(frame / RATE, "MOUSE_MOVE", [frame, -1]) for frame in range(30)]
    late = [((frame + 0.01) / RATE, "MOUSE_MOVE", [100, 0]) for frame in range(9, 29)]
    columns = controls(tmp_path, sharp + late)
    assert columns["mouse_x"].tolist() == [frame + (100 if frame >= 10 else 0) for frame in range(30)]
    assert columns["mouse_y"].tolist() == [-1] * 30


def test_mouse_and_wheel_are_summed_per_frame(tmp_path: Path) -> None:
    moves = [((4 + part / 10) / RATE, "MOUSE_MOVE", [part, -1]) for part in range(1, 10)]
    wheel = [(7.5 / RATE, "SCROLL", [120]), (7.6 / RATE, "SCROLL", [-240])]
    columns = controls(tmp_path, moves + wheel)
    assert (columns["mouse_x"][5], columns["mouse_y"][5], columns["scroll"][8]) == (45, -9, -120)
    assert columns["mouse_x"].sum() == 45


def test_before_the_video_keys_count_and_movements_do_not(tmp_path: Path) -> None:
    events = [
        key(-2.0, W, True),
        key(5.5 / RATE, W, False),
        key(-2.0, SPACE, True),
        key(-1.0, SPACE, False),
        (-1.0, "MOUSE_MOVE", [100, 100]),
        (-0.5 / RATE, "MOUSE_MOVE", [7, 0]),  # brings frame 0 about
    ]
    columns = controls(tmp_path, events)
    assert on(columns["W"]) == [0, 1, 2, 3, 4, 5, 6]
    assert on(columns["SPACE"]) == []
    assert on(columns["mouse_x"]) == [0]
    assert columns["mouse_x"][0] == 7


def test_taps_repeats_and_lost_events(tmp_path: Path) -> None:
    events = [
        key(3.2 / RATE, SPACE, True),  # a tap within one frame
        key(3.4 / RATE, SPACE, False),
        key(10.5 / RATE, W, True),  # held keys repeat
        key(12.5 / RATE, W, True),
        key(14.5 / RATE, W, False),
        key(2.5 / RATE, A, False),  # was down since before the log started
        key(27.5 / RATE, D, True),  # never released
        (20.5 / RATE, "MOUSE_BUTTON", [LEFT_CLICK, True]),
        (21.5 / RATE, "MOUSE_BUTTON", [LEFT_CLICK, False]),
        (22.5 / RATE, "MOUSE_BUTTON", [LEFT_CLICK, False]),  # released twice
    ]
    columns = controls(tmp_path, events)
    assert on(columns["SPACE"]) == [4]
    assert on(columns["W"]) == [11, 12, 13, 14, 15]
    assert on(columns["A"]) == [0, 1, 2, 3]
    assert on(columns["D"]) == [28, 29]
    assert on(columns["MOUSE_LEFT"]) == [21, 22]


@pytest.mark.parametrize("event", ["START", "END"])
def test_what_is_held_throughout_has_no_event_but_start_or_end(tmp_path: Path, event: str) -> None:
    """The recorder lists it there, in JSON that no CSV writer has quoted."""
    columns = controls(tmp_path, [(-1.0 if event == "START" else 1.5, event, HELD), key(0.5, A, True)])
    assert on(columns["W"]) == on(columns["MOUSE_RIGHT"]) == list(range(30))
    assert list(columns) == ["A", "D", "W", "MOUSE_RIGHT", *AXES]  # 255 is no key


def test_what_is_held_at_the_start_is_released_by_its_event(tmp_path: Path) -> None:
    end = (1.5, "END", {"inputs": {"keyboard": [SPACE], "mouse": [], "gamepads": {}}})
    events = [(-1.0, "START", HELD), key(10.5 / RATE, W, False), key(20.5 / RATE, SPACE, True), end]
    columns = controls(tmp_path, events)
    assert on(columns["W"]) == list(range(12))
    assert on(columns["SPACE"]) == list(range(21, 30))
    problems = read_events(tmp_path, events).problems
    assert problems == ["the release of MOUSE_RIGHT was not logged, it is treated as held to the end"]


def test_properly_quoted_and_damaged_lists_of_what_is_held(tmp_path: Path) -> None:
    path = tmp_path / "inputs.csv"
    for text, names in (
        (json.dumps(HELD).replace('"', '""'), ["W", "MOUSE_RIGHT"]),
        ("[]", []),
        ('{"inputs": {"keyboard": [87]}}', []),
        ('{"inputs": 1}', []),
    ):
        path.write_text(f'timestamp,event_type,event_args\n1.0,START,"{text}"\n2.0,VIDEO_START,"[]"\n')
        assert read_inputs(path).names == names


def test_everything_is_released_when_the_window_loses_the_focus(tmp_path: Path) -> None:
    events = [
        (-1.0, "START", HELD),
        key(5.5 / RATE, ALT, True),
        key(5.6 / RATE, TAB, True),
        (7.5 / RATE, "UNFOCUS", []),
        key(9.5 / RATE, SPACE, False),  # of another window
        (15.5 / RATE, "FOCUS", []),
        key(20.5 / RATE, W, True),
    ]
    columns = controls(tmp_path, events)
    assert on(columns["ALT"]) == on(columns["TAB"]) == [6, 7, 8]
    assert on(columns["MOUSE_RIGHT"]) == list(range(9))
    assert on(columns["W"]) == [*range(9), *range(21, 30)]
    assert on(columns["SPACE"]) == []


def test_a_clock_that_jumps_back_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "inputs.csv"
    times = (1000.0, 1010.0, 1009.9, 1003.0, 1004.0)  # threads write a little out of order, and the clock was set
    rows = [f'{time},MOUSE_MOVE,"[1, 0]"' for time in times]
    path.write_text("\n".join(["timestamp,event_type,event_args", '1000.0,VIDEO_START,"[]"', *rows]))
    assert read_inputs(path).problems == [
        "its clock jumps back by 7.0 s after 10.0 s, later inputs may not match the video"
    ]


def test_what_is_doubtful_about_a_recording_is_named(tmp_path: Path) -> None:
    root = tmp_path / "owl"
    for name in ("marked", "named", "black", "late", "two", "whole"):
        make_recording(root / name, [], frames=60)
    (root / "marked" / ".invalid").write_text("Video too short\nNo mouse movement\n")
    (root / "marked" / ".server_invalid").touch()
    (root / "named" / "recording.mp4").rename(root / "named" / "game play.mkv")
    inputs = root / "black" / "inputs.csv"
    inputs.write_text(inputs.read_text().replace(f"{VIDEO_START - 0.5!r},HOOK", f"{VIDEO_START + 0.52!r},HOOK"))
    inputs = root / "late" / "inputs.csv"
    inputs.write_text(
        inputs.read_text().replace(f"{VIDEO_START + 2.0!r},VIDEO_END", f"{VIDEO_START + 9.0!r},VIDEO_END")
    )
    for name in ("a.mp4", "b.mkv"):
        (root / "two" / name).write_bytes((root / "two" / "recording.mp4").read_bytes())
    (root / "two" / "recording.mp4").unlink()
    footage = find_footage(root, tmp_path / "data")
    problems = {recording.name: recording.problems for recording in footage.recordings}
    assert problems == {
        "black": ["its first 15 frames come before HOOK_START, so they are probably black"],
        "late": [
            "inputs.csv logs 9.0 s of video and the video has 2.0 s, so a clock jumped or frames were lost: inputs "
            "may not match the video"
        ],
        "marked": [
            "OWL Control marked it as invalid in .invalid (Video too short No mouse movement)",
            "OWL Control marked it as invalid in .server_invalid (without a reason)",
        ],
        "named": ["its video is game play.mkv instead of recording.mp4"],
        "whole": [],
    }
    assert list(footage.skipped) == ["two"]
    assert "2 other videos (a.mp4, b.mkv)" in footage.skipped["two"]


def test_buttons_are_named_ordered_and_mirrored(tmp_path: Path) -> None:
    codes = [W, A, SPACE, 0x25, 0x10, 0x70, 0x31, 0x07, 255]
    events = [key(0.1, code, True) for code in codes] + [(0.1, "MOUSE_BUTTON", [i, True]) for i in (2, 9)]
    buttons = order_buttons(read_events(tmp_path, events).names)
    letters = ["1", "A", "D", "W"]  # D and RIGHT complete the pairs that mirroring swaps; 255 is no key
    assert buttons == [*letters, "F1", "KEY_7", "LEFT", "RIGHT", "SHIFT", "SPACE", "MOUSE_9", "MOUSE_RIGHT"]
    description = describe_controls(buttons)
    assert description["mirror"]["buttons"] == {"A": "D", "D": "A", "LEFT": "RIGHT", "RIGHT": "LEFT"}
    mirror = Mirror.from_description(description, "here")
    assert [buttons[i] for i in mirror.buttons[:4]] == ["1", "D", "A", "W"]
    assert mirror.axes.tolist() == [-1, 1, 1]
    assert "brought frame t about" in description["timing"]


def test_unreadable_lines_cost_themselves_only(tmp_path: Path) -> None:
    path = tmp_path / "inputs.csv"
    lines = [
        "timestamp,event_type,event_args",
        f'{VIDEO_START},VIDEO_START,"[]"',
        f'{VIDEO_START + 0.1},KEYBOARD,"[87, true]"',
        'yesterday,KEYBOARD,"[87, false]"',
        'nan,MOUSE_MOVE,"[1, 1]"',
        f'{VIDEO_START + 0.1},MOUSE_MOVE,"[1]"',
        f'{VIDEO_START + 0.1},MOUSE_MOVE,"[1, 1e300]"',
        f'{VIDEO_START + 0.1},UNFOCUS,"[]"',
        f'{VIDEO_START + 0.2},GAMEPAD_AXIS,"[0, 0.5]"',
        f'{VIDEO_START + 0.3},MOUSE_MOVE,"[4, 5]"',
        f"{VIDEO_START + 0.4},MOUSE_MO",
    ]
    path.write_text("\r\n".join(lines))
    inputs = read_inputs(path)
    assert inputs.names == ["W"]
    assert inputs.values[inputs.kinds != RELEASE].tolist() == [[0, 1], [4, 5]]
    assert inputs.times[inputs.kinds != RELEASE] == pytest.approx([0.1, 0.3], abs=1e-6)
    assert inputs.logged == pytest.approx(0.3, abs=1e-6)  # END is missing
    assert inputs.problems == ["5 unreadable lines of inputs.csv were skipped", "1 gamepad events were skipped"]


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Four good recordings (one nested, one whose END is missing) and one for every way to be unfit."""
    root = tmp_path / "owl"
    walk = [key(10.5 / RATE, W, True), key(20.5 / RATE, W, False), (30.5 / RATE, "MOUSE_MOVE", [8, -2])]
    make_recording(root / "a", walk)
    make_recording(root / "b" / "deep", [key(0.5, A, True), key(0.6, A, False)])
    make_recording(root / "c", [])
    make_recording(root / "cut", [key(0.2, W, True), (24.5 / RATE, "SCROLL", [120])], ended=False)
    for name in ("empty-csv", "no-start", "no-video", "no-csv", "broken-video", "wrong-header"):
        make_recording(root / name, [], frames=5)
    (root / "empty-csv" / "inputs.csv").write_text("")
    text = (root / "no-start" / "inputs.csv").read_text()
    (root / "no-start" / "inputs.csv").write_text(text.replace("VIDEO_START", "SOMETHING"))
    (root / "no-video" / "recording.mp4").unlink()
    (root / "no-csv" / "inputs.csv").unlink()
    (root / "broken-video" / "recording.mp4").write_bytes(b"\0" * 999)
    (root / "wrong-header" / "inputs.csv").write_text("time,what\n1,START\n")
    (root / "a" / "metadata.json").write_text("{")  # of no use, so of no harm
    (root / "loose.mp4").write_bytes((root / "a" / "recording.mp4").read_bytes())
    return root


def test_a_folder_of_recordings_becomes_a_dataset_with_controls(recordings: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="is left out") as caught:
        imported = import_footage(recordings, tmp_path / "data")
    warned = "\n".join(str(warning.message) for warning in caught)
    assert list(imported.footage.skipped) == [
        "broken-video",
        "empty-csv",
        "loose.mp4",
        "no-csv",
        "no-start",
        "no-video",
        "wrong-header",
    ]
    assert all(f"{name} is left out: " in warned for name in imported.footage.skipped)
    assert "cut: inputs.csv ends after 0.8 of 2.0 s, the rest is left out" in warned
    assert [recording.name for recording in imported.footage.recordings] == ["a", "b/deep", "c", "cut"]
    assert list(imported.episodes.values()) == [60, 60, 60, 25]
    assert all(imported.info.splits.values())
    described = imported.info.modalities["controls"]
    assert (described["buttons"], described["axes"]) == (["A", "D", "W"], AXES)

    split = next(name for name, episodes in imported.info.splits.items() if "00000-a-0000" in episodes)
    windows = WindowDataset(str(tmp_path / "data"), split, ["rgb", "controls"], length=60, size=(48, 64))
    sample = next(s for s in (windows[i] for i in range(len(windows))) if on(s["buttons"][:, 2].numpy()))
    assert on(sample["buttons"][:, 2].numpy()) == list(range(11, 22))
    assert sample["axes"][31].tolist() == [8, -2, 0]
    assert [frame_number(frame.permute(1, 2, 0).numpy()) for frame in sample["rgb"]] == list(range(60))


def test_one_recording_is_a_valid_source(recordings: Path, tmp_path: Path) -> None:
    imported = import_footage(recordings / "a", tmp_path / "data", fps=15)
    assert [recording.name for recording in imported.footage.recordings] == ["a"]
    assert sum(imported.episodes.values()) == 30
    assert imported.info.fps == 15


def test_where_nothing_is_fit_one_sentence_says_so(tmp_path: Path) -> None:
    make_recording(tmp_path / "owl", [], frames=2)
    (tmp_path / "owl" / "inputs.csv").write_text("")
    with refused("footage.unusable", str(tmp_path / "owl"), "1 recordings", "inputs.csv is empty"):
        import_footage(tmp_path / "owl", tmp_path / "data")
    assert not (tmp_path / "data").exists()
