"""The session: what is played can be returned to, branched, recorded, and played again bit for bit."""

import queue
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from owl.errors import OwlError
from owl.play import protocol, recording
from owl.play.log import ActionLog
from owl.play.protocol import Command, Input, Start
from owl.play.replay import replay
from owl.play.session import MOST_STARTS, Session, due
from owl.play.world import Picture
from owl.viz.pictures import png
from tests.helpers.errors import check_error
from tests.helpers.play import RATE, Strip

Event = tuple[str, Any]


class Events:
    """A listener that keeps everything in order."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()

    def frame(self, message: bytes) -> None:
        """Keep."""
        self.events.put(("frame", protocol.parse_frame(message)))

    def sound(self, message: bytes) -> None:
        """Keep."""
        self.events.put(("sound", protocol.parse_sound(message, 2)))

    def state(self, state: dict[str, Any]) -> None:
        """Keep."""
        self.events.put(("state", state))

    def notice(self, text: str) -> None:
        """Keep."""
        self.events.put(("notice", text))

    def meters(self, values: list[dict[str, Any]]) -> None:
        """Keep."""
        self.events.put(("meters", values))

    def failed(self, error: BaseException) -> None:
        """Keep."""
        self.events.put(("failed", error))


class Played:
    """A session and its events."""

    def __init__(self, world: Strip, folder: Path) -> None:
        self.world, self.listener = world, Events()
        self.session = Session(world, folder, 0, self.listener)
        self.session.begin()
        self.state: dict[str, Any] = {}
        self.frames: list[tuple[int, bytes]] = []
        self.sounds: list[tuple[int, np.ndarray]] = []
        self.next("state")

    def next(self, wanted: str) -> Any:
        """Return the next event of a kind, and keep frames and states on the way."""
        while True:
            kind, value = self.listener.events.get(timeout=60)
            if kind == "frame":
                self.frames.append((value[0], value[3]))
            elif kind == "sound":
                assert value[0] == self.frames[-1][0]  # after its picture
                self.sounds.append(value)
            elif kind == "state":
                self.state = value
            if kind == wanted:
                return value

    def do(self, name: str, **fields: Any) -> None:
        """Send a command; its state is the last event that it brings about."""
        self.session.send(Command(name, **fields))
        self.next("state")

    def step(self, frames: int, held: bool = False, moved: float = 0.0) -> None:
        """Make single frames with the same controls."""
        for _ in range(frames):
            axes = np.array([moved], np.float32)
            self.session.inputs.put(Input(1.0, np.array([held, False]), axes, 0 * axes))
            self.do("step")
            if self.state["frame"] % self.world.description.fps == 0:
                self.next("state")  # a moment was added: the state was sent twice

    def moment(self, frame: int, branch: int = 0) -> int:
        """Return the number of a moment."""
        return next(m["number"] for m in self.state["moments"] if (m["frame"], m["branch"]) == (frame, branch))


SECOND = 4  # frames


@pytest.fixture
def played(tmp_path: Path) -> Iterator[Played]:
    """A session of a strip with few frames per second, so that moments are dense."""
    made = Played(Strip(fps=SECOND), tmp_path / "played")
    yield made
    made.session.close()
    assert made.world.closed


def test_it_starts_paused_and_shows_the_start(played: Played) -> None:
    assert played.state["paused"]
    assert played.state["frame"] == 0
    assert [number for number, _ in played.frames] == [0]
    assert len(played.state["moments"]) == 1


def test_a_step_is_one_frame_and_resuming_many(tmp_path: Path) -> None:
    played = Played(Strip(fps=500), tmp_path)
    played.step(2)
    assert (played.state["frame"], played.state["paused"]) == (2, True)
    played.do("resume")
    while played.frames[-1][0] < 30:
        played.next("frame")
    played.session.send(Command("pause"))
    while not played.state["paused"]:  # others come with moments
        played.next("state")
    stopped = played.state["frame"]
    assert [number for number, _ in played.frames] == list(range(played.frames[-1][0] + 1))
    played.step(1)
    assert played.state["frame"] == stopped + 1
    played.session.close()


def begins(*took: float) -> list[float]:
    """When frames begin that take these times in seconds, of four frames a second."""
    now = deadline = 0.0
    times = []
    for seconds in took:
        now = max(now, deadline)
        times.append(now)
        now += seconds
        deadline = due(deadline, 0.25, now)
    return times


def test_of_a_delay_at_most_one_frame_is_made_up_for() -> None:
    assert begins(0.125, 0.125, 0.125) == [0, 0.25, 0.5]
    assert begins(0.375, 0.125, 0.125, 0.125) == [0, 0.375, 0.5, 0.75]
    assert begins(5.0, 0.125, 0.125, 0.125) == [0, 5, 5.125, 5.25]


def test_rewinding_shows_the_same_future_for_the_same_actions(played: Played) -> None:
    played.step(SECOND, moved=3.0)
    played.step(SECOND, held=True, moved=-1.0)
    before = dict(played.frames)
    played.frames.clear()
    played.do("rewind", moment=played.moment(SECOND))
    assert (played.state["frame"], played.state["branch"], played.state["paused"]) == (SECOND, 0, True)
    played.step(SECOND, held=True, moved=-1.0)
    assert dict(played.frames) == {number: before[number] for number in range(SECOND, 2 * SECOND + 1)}
    assert played.state["branch"] == 1


def test_branches_keep_each_other(played: Played) -> None:
    played.step(2 * SECOND, moved=1.0)
    first = played.session.log()
    played.do("rewind", moment=played.moment(SECOND))
    played.step(SECOND, moved=-1.0)
    assert played.state["branch"] == 1
    fork, tip = played.moment(SECOND), played.moment(2 * SECOND, branch=1)
    parents = {m["number"]: m["parent"] for m in played.state["moments"]}
    assert parents[tip] == fork
    second = played.session.log()
    played.do("rewind", moment=played.moment(2 * SECOND))
    played.step(1, moved=5.0)  # the end of a branch continues
    assert played.state["branch"] == 0
    third = played.session.log()
    moved = [[float(action.axes[0]) for action in log.actions] for log in (first, second, third)]
    assert moved == [[1.0] * 8, [1.0] * 4 + [-1.0] * 4, [1.0] * 8 + [5.0]]
    assert set(played.session.thumbnails) == {m["number"] for m in played.state["moments"]}


def test_settings_belong_to_the_frames_and_come_back_with_them(played: Played) -> None:
    played.do("settings", steps=9)
    played.step(SECOND)
    played.do("settings", steps=2, guidance=1.5, shift=2.0, sampler="euler")
    assert (
        played.state["settings"].items()
        >= {"steps": 2, "context_noise": 0.0, "guidance": 1.5, "decoder": "only", "shift": 2.0}.items()
    )
    played.step(1)
    assert [action.settings.steps for action in played.session.log().actions] == [9] * SECOND + [2]
    played.do("rewind", moment=played.moment(SECOND))
    assert played.state["settings"]["steps"] == 9


def test_a_recording_is_a_film_and_a_log_that_can_be_replayed(played: Played, tmp_path: Path) -> None:
    played.do("reset", start=1, seed=7)
    played.step(3, moved=2.0)
    played.do("record", on=True)
    assert played.state["recording"]
    played.step(3, held=True)
    played.do("settings", steps=6)
    played.step(2, moved=0.1)
    played.do("record", on=False)
    film, log = (tmp_path / "played" / name for name in played.state["recordings"])
    with av.open(str(film)) as container:
        assert len(list(container.decode(video=0))) == 5
    actions = ActionLog.load(log)
    assert (actions.start, actions.seed, len(actions.actions)) == (1, 7, 8)
    assert all(frame.same for frame in replay(actions, Strip()))
    wrong = actions.actions[2].buttons.copy()
    wrong[0] = True
    object.__setattr__(actions.actions[2], "buttons", wrong)
    assert [frame.same for frame in replay(actions, Strip())] == [number != 2 for number in range(8)]


def test_sound_belongs_to_frames_films_and_replays(tmp_path: Path) -> None:
    played = Played(Strip(fps=SECOND, sound=True), tmp_path)
    played.step(2)
    played.do("record", on=True)
    played.step(1, held=True)
    played.session.inputs.release()
    played.step(2)
    played.do("record", on=False)
    assert [(number, float(np.abs(sound).max()) > 0.7) for number, sound in played.sounds] == [
        *((1, False), (2, False), (3, True), (4, False), (5, False)),
    ]
    film, name = (tmp_path / recorded for recorded in played.state["recordings"])
    with av.open(str(film)) as container:
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], 1)
    samples = RATE // SECOND
    assert 3 * samples <= heard.shape[1] <= 3 * samples + 2048  # AAC pads its last frame
    left, right = (np.sqrt(np.square(side[1000 : samples - 1000]).mean()) for side in heard)
    assert left == pytest.approx(0.8 / np.sqrt(2), rel=0.1)
    assert right == pytest.approx(left / 2, rel=0.1)
    assert np.abs(heard[:, samples + 2048 : 3 * samples]).max() < 0.01
    played.do("rewind", moment=played.moment(SECOND))
    played.step(1)
    assert played.sounds[-1][0] == SECOND + 1
    log = ActionLog.load(name)
    assert all(frame.same for frame in replay(log, Strip(fps=SECOND, sound=True)))
    assert not any(frame.same for frame in replay(log, Strip(fps=SECOND)))
    played.session.close()


class Undecoded(Strip):
    """A strip whose sound is ready only when it is told so."""

    def __init__(self) -> None:
        super().__init__(fps=SECOND, sound=True)
        self.ready, self.made = threading.Event(), queue.Queue[None]()

    def step(self, buttons: np.ndarray, axes: np.ndarray) -> Picture:
        """Move."""
        picture = super().step(buttons, axes)
        sound = picture.sound
        self.made.put(None)

        def hear() -> np.ndarray:
            assert sound is not None
            assert self.ready.wait(60)
            return sound

        return replace(picture, hear=hear)


def test_a_frame_is_shown_and_the_next_one_made_while_its_sound_is_decoded(tmp_path: Path) -> None:
    world = Undecoded()
    played = Played(world, tmp_path)
    played.session.send(Command("resume"))
    while played.next("frame")[0] != 1:
        pass
    for _ in range(2):
        world.made.get(timeout=60)
    assert not played.sounds
    world.ready.set()
    assert played.next("sound")[0] == 1
    assert played.frames[-1][0] == 1
    played.session.close()


def test_a_recording_without_frames_is_a_log_alone(played: Played) -> None:
    played.step(1)
    played.do("record", on=True)
    played.do("record", on=False)
    played.do("record", on=True)
    played.do("record", on=False)  # in the same second
    first, second = played.state["recordings"]
    assert first != second
    assert len(ActionLog.load(played.session.folder / first).actions) == 1


def test_a_picture_of_the_player_is_a_start_and_is_replayed(played: Played, tmp_path: Path) -> None:
    given = np.random.default_rng(5).integers(0, 255, (16, 24, 3), np.uint8)
    played.session.send(Start(png(given)))
    played.next("state")
    assert (played.state["start"], played.state["starts"], played.state["frame"]) == (2, 3, 0)
    assert played.session.starts[2][:2] == b"\xff\xd8"
    played.step(2, moved=3.0)
    played.do("record", on=True)
    played.do("record", on=False)
    log = ActionLog.load(tmp_path / "played" / played.state["recordings"][0])
    assert all(frame.same for frame in replay(log, Strip(fps=SECOND)))
    other = replace(log, begin=png(255 - given))
    assert not any(frame.same for frame in replay(other, Strip(fps=SECOND)))
    played.do("reset", start=0)
    assert played.session.log().begin is None
    for _ in range(MOST_STARTS - 3):
        played.session.send(Start(png(given)))
        played.next("state")
    played.session.send(Start(png(given)))
    assert f"{MOST_STARTS} start scenes" in played.next("notice")


def without_palette() -> bytes:
    """A PNG of 16x24 pixels whose colours are numbers of a palette that it does not have."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", 24, 16, 8, 3, 0, 0, 0),
        b"tRNS": b"\0",
        b"IDAT": zlib.compress(bytes(400)),
    }
    parts = [(len(x), kind + x) for kind, x in (chunks | {b"IEND": b""}).items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", length) + part + struct.pack(">I", zlib.crc32(part)) for length, part in parts
    )


@pytest.mark.parametrize(
    ("content", "notice"),
    [
        (b"no picture", "damaged, or neither JPEG nor PNG, expected 16x24"),
        (png(np.zeros((16, 24, 3), np.uint8))[:50], "damaged"),
        (without_palette(), "damaged"),
        (png(np.zeros((24, 16, 3), np.uint8)), "24x16 (height x width), expected 16x24"),
        (png(np.zeros((3000, 4000, 3), np.uint8)), "3000x4000"),
    ],
    ids=["text", "cut", "palette", "upright", "large"],
)
def test_what_is_no_picture_of_this_world_is_reported(played: Played, content: bytes, notice: str) -> None:
    before = played.state
    played.session.send(Start(content))
    assert notice in played.next("notice")
    played.next("state")
    assert played.state == before


def test_closing_finishes_a_recording(tmp_path: Path) -> None:
    played = Played(Strip(fps=SECOND), tmp_path)
    played.do("record", on=True)
    played.step(1)
    played.session.close()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl", ".mp4"]


@pytest.mark.parametrize(
    ("command", "notice"),
    [
        (Command("reset", start=2), "there is no start 2, expected 0 to 1"),
        (Command("reset", seed=-1), "seed is -1"),
        (Command("rewind", moment=99), "there is no moment 99"),
        (Command("rewind"), "there is no moment None"),
        (Command("settings", steps=0), "steps is 0, expected 1 to 128"),
        (Command("settings", context_noise=1.0), "context_noise is 1.0"),
        (Command("settings", guidance=-2), "guidance is -2"),
        (Command("settings", shift=0.0), "shift is 0.0, expected 0.01 to 100"),
        (Command("settings", sampler="heun"), "sampler is heun, expected one of adams_bashforth"),
    ],
)
def test_impossible_commands_are_reported_and_change_nothing(played: Played, command: Command, notice: str) -> None:
    before = played.state
    played.session.send(command)
    assert notice in played.next("notice")
    played.next("state")
    assert played.state == before
    played.step(1)


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    played = Played(Strip(fps=SECOND), tmp_path / "file")
    played.do("record", on=True)
    played.step(1)
    played.session.send(Command("record", on=False))
    assert "file" in played.next("notice")
    played.step(1)
    played.session.close()


def test_commands_that_wait_are_bounded(tmp_path: Path) -> None:
    session = Session(Strip(), tmp_path, 0, Events())  # not started: no command is executed
    assert [session.send(Command("step")) for _ in range(100)].count(True) == 64
    session.begin()
    session.close()


def test_an_error_of_the_world_ends_the_session_and_keeps_its_recording(tmp_path: Path) -> None:
    class Broken(Strip):
        def step(self, buttons: np.ndarray, axes: np.ndarray) -> Picture:
            if self.x > 0:
                raise OwlError("game.stopped", "the game stopped; run the same command again")
            return super().step(buttons, axes)

    played = Played(Broken(fps=SECOND), tmp_path)
    played.do("record", on=True)
    played.step(1, moved=1.0)
    played.session.send(Command("resume"))
    check_error(played.next("failed"), "game.stopped")
    played.session.close()
    assert played.world.closed
    film, log = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert film.stat().st_size > 0
    assert len(ActionLog.load(log).actions) == 1


def test_a_film_that_fails_leaves_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on the disk")

    monkeypatch.setattr(recording, "write_pictures", full)
    played = Played(Strip(fps=SECOND), tmp_path)
    played.do("record", on=True)
    played.step(1)
    played.session.send(Command("record", on=False))
    assert "no space left" in played.next("notice")
    played.session.close()
    (log,) = tmp_path.iterdir()
    assert len(ActionLog.load(log).actions) == 1
