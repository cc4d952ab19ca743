"""The thread that plays a world: samples the controls, makes frames in real time, executes commands between them."""

import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from owl.data.codecs import encode_rgb
from owl.errors import OwlError
from owl.play.inputs import Inputs, Sample
from owl.play.log import Action, ActionLog, digest, read_picture
from owl.play.meters import Meters
from owl.play.protocol import SETTINGS, Command, Start, frame_message, sound_message
from owl.play.recording import Recording
from owl.play.timeline import Moment, Played, Timeline, in_order
from owl.play.world import Picture, Settings, World
from owl.viz.pictures import png

QUALITY = 90
"""Of JPEG."""
WAITING = 64
"""Commands that may wait."""
MOST_STARTS = 36
"""Start scenes, those of the world and those of the player together."""
LOG_SUFFIX = ".jsonl"


class Listener(Protocol):
    """Receives the messages of the session; called from its threads, must not wait."""

    def frame(self, message: bytes) -> None:
        """Receive a frame, see `owl.play.protocol.frame_message`."""

    def sound(self, message: bytes) -> None:
        """Receive the sound of the last frame, see `owl.play.protocol.sound_message`."""

    def state(self, state: dict[str, Any]) -> None:
        """Receive what has changed beside the picture."""

    def notice(self, text: str) -> None:
        """Receive a sentence for the player."""

    def meters(self, values: list[dict[str, Any]]) -> None:
        """Receive what was measured, see `owl.play.meters.Meters`."""

    def failed(self, error: BaseException) -> None:
        """Receive an error that ends the session."""


class Session:
    """One world, played by one person at a time.

    It starts paused at the first start scene.

    Args:
        world: The world; only the session's thread calls it.
        folder: Folder for recordings.
        seed: First seed.
        listener: Receives frames and states.
    """

    def __init__(self, world: World, folder: Path, seed: int, listener: Listener) -> None:
        self.world, self.folder, self.seed, self.start = world, folder, seed, 0
        self.listener = listener
        description = world.description
        self.inputs = Inputs(len(description.buttons), list(description.axes.values()))
        self.thumbnails: dict[int, bytes] = {}
        self.recordings: list[str] = []
        self.meters = Meters(world.references, description.fps, listener.meters, listener.notice, listener.failed)
        self.starts = dict(enumerate(map(encode, description.starts)))
        self._given = len(self.starts)  # those of the world itself
        self._commands: queue.Queue[Command | Start | None] = queue.Queue()
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="owl-jpeg")
        self._encoding: Future[bytes] | None = None
        self._timeline = Timeline()
        self._paused = True
        self._recording: Recording | None = None
        self._thread = threading.Thread(target=self._run, name="owl-play", daemon=True)

    def begin(self) -> None:
        """Start the threads."""
        self._thread.start()
        self.meters.begin()

    def send(self, command: Command | Start) -> bool:
        """Queue a command of those that change the world; return False if too many are waiting."""
        if self._commands.qsize() >= WAITING:
            return False
        self._commands.put(command)
        return True

    def release(self) -> None:
        """Release the controls and pause, as when the player leaves."""
        self.inputs.release()
        self._commands.put(Command("pause"))

    def close(self) -> None:
        """End the session; a recording is finished."""
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            try:
                self._play()
            finally:
                self._record(False)  # also what was played until an error
        except BaseException as error:
            self.listener.failed(error)
        finally:
            self._encoder.shutdown()
            self.meters.close()
            self.world.close()

    def _play(self) -> None:
        self._reset(0, self.seed)
        self._report()
        deadline, interval = time.perf_counter(), 1 / self.world.description.fps
        while True:
            wait = None if self._paused else max(0.0, deadline - time.perf_counter())
            try:
                command = self._commands.get(timeout=wait)
            except queue.Empty:
                self._advance()
                deadline = due(deadline, interval, time.perf_counter())
                continue
            if command is None:
                return
            try:
                self._execute(command)
            except (OwlError, OSError) as error:
                self.listener.notice(str(error))
            self._report()

    def _execute(self, command: Command | Start) -> None:
        self._wait_encoded()
        if isinstance(command, Start):
            self._start_with(command)
            return
        actions: dict[str, Callable[[], None]] = {
            "pause": lambda: self._pause(True),
            "resume": lambda: self._pause(False),
            "step": self._step,
            "reset": lambda: self._reset(
                self.start if command.start is None else command.start,
                self.seed if command.seed is None else command.seed,
            ),
            "rewind": lambda: self._rewind(command.moment),
            "settings": lambda: self._change(command),
            "record": lambda: self._record(bool(command.on)),
        }
        actions[command.name]()

    def _pause(self, paused: bool) -> None:
        self._paused = paused

    def _step(self) -> None:
        self._paused = True
        self._advance()
        self._wait_encoded()

    def _reset(self, start: int, seed: int) -> None:
        picture = self.world.reset(start, seed)
        self.start, self.seed = start, seed
        self._frame, self._branch = 0, 0
        self._played: Played[Action] | None = None
        self._tips: dict[int, Played[Action] | None] = {0: None}  # the last frame of each branch
        self._timeline.clear(self.world.snapshot_bytes())
        self.inputs.release()
        self.meters.cut()
        self._show(self._remember(encode(picture.rgb)))

    def _start_with(self, start: Start) -> None:
        starts = self.world.description.starts
        if len(starts) >= MOST_STARTS:
            raise OwlError("play.picture", f"there are {len(starts)} start scenes already; choose one of them")
        self.world.add_start(read_picture(start.content, self.world.description.start_size))
        number = len(starts) - 1
        self.starts = {**self.starts, number: encode(starts[number])}
        self._reset(number, self.seed)

    def _rewind(self, number: int | None) -> None:
        moment = self._timeline.moments.get(-1 if number is None else number)
        if moment is None:
            raise OwlError("play.moment", f"there is no moment {number}, it may have been thinned out; choose another")
        self.world.restore(moment.snapshot)
        self._timeline.current = moment
        self._frame, self._branch, self._played = moment.frame, moment.branch, moment.played
        self._paused = True
        self.inputs.release()
        self.meters.cut()
        self._show(moment)

    def _change(self, command: Command) -> None:
        given = {name: getattr(command, name) for name in SETTINGS}
        settings = replace(self.world.settings, **{name: v for name, v in given.items() if v is not None})
        self.world.change(settings)

    def _record(self, on: bool) -> None:
        if on and self._recording is None:
            self._recording = Recording(self.folder, self.world.description)
        elif not on and self._recording is not None:
            recording, self._recording = self._recording, None
            log = recording.path.with_suffix(LOG_SUFFIX)
            try:
                self._wait_encoded()
                self.log().save(log)  # first: it does not depend on the film
            finally:
                film = recording.finish()
            self.recordings = [*self.recordings, *(path.name for path in (film, log) if path.exists())]

    def log(self) -> ActionLog:
        """Return the action log of the current branch from its start."""
        description = self.world.description
        return ActionLog(
            description.origin,
            description.buttons,
            list(description.axes),
            self.start,
            self.seed,
            in_order(self._played),
            None if self.start < max(1, self._given) else png(description.starts[self.start]),
        )

    def _advance(self) -> None:
        """Make the next frame, and finish it while the one after it is made."""
        sample, settings = self.inputs.take(), self.world.settings
        picture = self.world.step(sample.buttons, sample.axes)
        self._wait_encoded()
        if self._tips[self._branch] is not self._played:  # there is a future already: start another one
            self._branch = len(self._tips)
        self._frame += 1
        if self._recording is not None:
            self._recording.add(picture)
        self.meters.add(picture.rgb, sample.buttons, sample.axes)
        self._encoding = self._encoder.submit(self._finish, self._frame, picture, sample, settings)
        if self._frame % max(1, round(self.world.description.fps)) == 0:
            self._remember(self._encoding.result())
            self._report()

    def _finish(self, frame: int, picture: Picture, sample: Sample, settings: Settings) -> bytes:
        """Encode a frame, hand it out, and add it to what was played."""
        start = time.perf_counter()
        jpeg = encode(picture.rgb)
        seconds = {"wait": sample.waited, **picture.seconds, "encode": time.perf_counter() - start}
        milliseconds = {name: 1000 * value for name, value in seconds.items()}
        self.listener.frame(frame_message(frame, sample.time, milliseconds, jpeg))
        if (sound := picture.sound) is not None and sound.size:  # waits for it
            self.listener.sound(sound_message(frame, sound))
        self._played = Played(self._played, Action(sample.buttons, sample.axes, settings, digest(picture)))
        self._tips[self._branch] = self._played
        return jpeg

    def _wait_encoded(self) -> None:
        """Wait until the last frame is finished; before that, what was played lacks it."""
        if self._encoding is not None:
            self._encoding.result()
            self._encoding = None

    def _show(self, moment: Moment) -> None:
        self.listener.frame(frame_message(moment.frame, math.nan, {}, moment.jpeg))

    def _remember(self, jpeg: bytes) -> Moment:
        moment = self._timeline.add(self._frame, self._branch, jpeg, self.world.snapshot(), self._played)
        self.thumbnails = {number: kept.jpeg for number, kept in self._timeline.moments.items()}
        return moment

    def _report(self) -> None:
        """Hand out what the page shows beside the picture."""
        self.listener.state(
            {
                "paused": self._paused,
                "frame": self._frame,
                "branch": self._branch,
                "start": self.start,
                "starts": len(self.starts),
                "seed": self.seed,
                "settings": asdict(self.world.settings),
                "recording": self._recording is not None,
                "recordings": self.recordings,
                "moment": self._timeline.current and self._timeline.current.number,
                "moments": [
                    {name: getattr(moment, name) for name in ("number", "frame", "branch", "parent")}
                    for moment in self._timeline.moments.values()
                ],
            }
        )


def due(deadline: float, interval: float, now: float) -> float:
    """Return when the next frame is due, in seconds.

    Of a delay, at most one frame is made up for: enough for the sound to keep up with real time.

    Args:
        deadline: When the last frame was due.
        interval: Time from one frame to the next.
        now: When the last frame was done.
    """
    return max(deadline + interval, now - interval)


def encode(rgb: np.ndarray) -> bytes:
    """Encode uint8[H, W, 3] as JPEG without subsampling of colours."""
    return encode_rgb(rgb, QUALITY, chroma="444")
