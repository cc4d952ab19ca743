"""Inputs of OWL Control recordings: reading ``inputs.csv``, and controls in step with the frames.

The format: header ``timestamp,event_type,event_args``; unix seconds, a name, quoted JSON. The video's time zero is the
event VIDEO_START; frames before HOOK_START are black. Keys and mouse buttons are Windows virtual-key codes; START and
END list those that are down. Source: InputEventType in src/output_types.rs of github.com/Wayfarer-Labs/owl-control.
"""

import json
import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from owl.data.modalities.controls import Controls

INPUTS_NAME = "inputs.csv"
VIDEO_NAME = "recording.mp4"
INVALID_NAMES = (".invalid", ".server_invalid")
"""Files with which OWL Control marks invalid recordings; they contain the reasons."""
HEADER = ["timestamp", "event_type", "event_args"]
AXES = ["mouse_x", "mouse_y", "scroll"]
TIMING = (
    "frame t holds the controls that brought frame t about from frame t-1: events after frame t-1 and up to frame t; "
    "a button is 1 if it was down for any part of that time, axes are sums"
)
ON_TIME = 1e-3
"""Frames by which an event may come after a frame and still count as simultaneous: unix times round to 0.2 us."""
CLOCK_JUMP = 0.5
"""Seconds by which times may run backwards, as those of different threads do, without a jump of the clock."""

KEYS = {
    0x08: "BACKSPACE", 0x09: "TAB", 0x0C: "CLEAR", 0x0D: "ENTER", 0x10: "SHIFT", 0x11: "CTRL",
    0x12: "ALT", 0x13: "PAUSE", 0x14: "CAPS_LOCK", 0x1B: "ESC", 0x20: "SPACE", 0x21: "PAGE_UP", 0x22: "PAGE_DOWN",
    0x23: "END", 0x24: "HOME", 0x25: "LEFT", 0x26: "UP", 0x27: "RIGHT", 0x28: "DOWN", 0x2C: "PRINT_SCREEN",
    0x2D: "INSERT", 0x2E: "DELETE", 0x5B: "LEFT_WINDOWS", 0x5C: "RIGHT_WINDOWS", 0x5D: "MENU",
    0x6A: "NUMPAD_MULTIPLY", 0x6B: "NUMPAD_ADD",
    0x6D: "NUMPAD_SUBTRACT", 0x6E: "NUMPAD_DECIMAL", 0x6F: "NUMPAD_DIVIDE", 0x90: "NUM_LOCK", 0x91: "SCROLL_LOCK",
    0xA0: "LEFT_SHIFT", 0xA1: "RIGHT_SHIFT", 0xA2: "LEFT_CTRL", 0xA3: "RIGHT_CTRL", 0xA4: "LEFT_ALT", 0xA5: "RIGHT_ALT",
    0xBA: "SEMICOLON", 0xBB: "EQUALS", 0xBC: "COMMA", 0xBD: "MINUS", 0xBE: "PERIOD", 0xBF: "SLASH", 0xC0: "BACKQUOTE",
    0xDB: "LEFT_BRACKET", 0xDC: "BACKSLASH", 0xDD: "RIGHT_BRACKET", 0xDE: "QUOTE", 0xE2: "LESS_GREATER",
    **{code: chr(code) for code in (*range(0x30, 0x3A), *range(0x41, 0x5B))},
    **{0x60 + digit: f"NUMPAD_{digit}" for digit in range(10)},
    **{0x6F + number: f"F{number}" for number in range(1, 25)},
}  # fmt: skip
"""Names of keys by virtual-key code; others are called KEY_<code>."""
MOUSE_BUTTONS = {1: "MOUSE_LEFT", 2: "MOUSE_RIGHT", 4: "MOUSE_MIDDLE", 5: "MOUSE_X1", 6: "MOUSE_X2"}
NO_KEY = (0, 255)  # Windows reports these codes with a real key's escape sequence
MIRRORED = (("A", "D"), ("LEFT", "RIGHT"))

BUTTON, MOVE, SCROLL, RELEASE = range(4)
MARKS = ("START", "HOOK_START", "VIDEO_START", "VIDEO_END", "END")


@dataclass(frozen=True)
class Inputs:
    """The events of one recording that controls are made of, in time order. N events.

    Attributes:
        times: float64[N], seconds since VIDEO_START; negative before it.
        kinds: int8[N], BUTTON, MOVE, SCROLL, or RELEASE of all buttons.
        values: int64[N, 2]: (position in ``names``, 1 down or 0 up), (dx, dy), (amount, 0), or (0, 0).
        names: Names of the buttons that occur, in order of appearance.
        logged: Seconds since VIDEO_START up to which inputs are known; infinite if their end was logged.
        hooked: Seconds since VIDEO_START up to which pictures are black; 0 or less where none are.
        seconds: From VIDEO_START to VIDEO_END; NaN if that was not logged.
        problems: Non-fatal problems, one clause each.
    """

    times: np.ndarray
    kinds: np.ndarray
    values: np.ndarray
    names: list[str]
    logged: float
    hooked: float
    seconds: float
    problems: list[str]


def read_inputs(path: str | Path) -> Inputs:
    """Read the events of one recording. Unreadable lines and gamepad events are counted and skipped.

    Raises:
        ValueError: The file is empty, has another header, or lacks the event VIDEO_START.
        OSError: It cannot be read.
    """
    log = _Log()
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        header = file.readline().strip()
        if not header:
            raise ValueError(f"{INPUTS_NAME} is empty")
        if [name.strip() for name in header.split(",")] != HEADER:
            raise ValueError(f"{INPUTS_NAME} starts with {header[:60]!r} instead of {','.join(HEADER)!r}")
        for line in file:
            if line.strip():
                log.add(line)
    return log.inputs()


class _Log:
    """Events of an ``inputs.csv`` in the order of its lines."""

    def __init__(self) -> None:
        self._times, self._kinds, self._values = array("d"), array("b"), array("q")
        self._names: dict[str, int] = {}
        self._marks: dict[str, float] = {}  # first times of the events that occur once
        self._held: list[str] | None = None  # at END, if it lists them
        self._last, self._unreadable, self._gamepad = -math.inf, 0, 0
        # the clock, by inputs only: marks may be written when their time is known
        self._latest, self._jump, self._jumped = -math.inf, 0.0, 0.0

    def add(self, line: str) -> None:
        """Add the event of a line, or count it as unreadable."""
        try:
            time = self._read(line)
        except (ValueError, TypeError, KeyError, OverflowError):
            self._unreadable += 1
        else:
            self._last = max(self._last, time)

    def _read(self, line: str) -> float:
        """Add the event of a line and return its time."""
        time, event, arguments = _parse(line)
        if event in MARKS:
            self._marks.setdefault(event, time)
            if event == "START":
                for name in _held(arguments) or ():
                    self._append(time, BUTTON, self._names.setdefault(name, len(self._names)), 1)
            elif event == "END":
                self._held = _held(arguments)
        elif event.startswith("GAMEPAD"):
            self._gamepad += 1
        elif (entry := _entry(event, arguments, self._names)) is not None:
            if self._latest - time > max(self._jump, CLOCK_JUMP):
                self._jump, self._jumped = self._latest - time, self._latest
            self._latest = max(self._latest, time)
            self._append(time, *entry)
        return time

    def _append(self, time: float, kind: int, *values: int) -> None:
        self._kinds.append(kind)
        self._values.extend(values)
        self._times.append(time)

    def inputs(self) -> Inputs:
        """Return the events in time order.

        Raises:
            ValueError: There was no VIDEO_START.
        """
        marks, start = self._marks, self._marks.get("VIDEO_START", math.nan)
        if math.isnan(start):
            raise ValueError(f"{INPUTS_NAME} has no VIDEO_START, so its inputs cannot be aligned with the video")
        for name in self._held or ():
            if name not in self._names:  # no event of it: it was down all the time
                self._names[name] = len(self._names)
                self._append(min(start, min(self._times, default=start)), BUTTON, self._names[name], 1)
        order = np.argsort(np.array(self._times), kind="stable")
        inputs = Inputs(
            times=np.array(self._times)[order] - start,
            kinds=np.array(self._kinds, np.int8)[order],
            values=np.array(self._values, np.int64).reshape(-1, 2)[order],
            names=list(self._names),
            logged=math.inf if marks.keys() & {"END", "VIDEO_END"} else self._last - start,
            hooked=marks.get("HOOK_START", start) - start,
            seconds=marks.get("VIDEO_END", math.nan) - start,
            problems=[],
        )
        inputs.problems.extend(self._problems(inputs, start))
        return inputs

    def _problems(self, inputs: Inputs, start: float) -> Iterator[str]:
        if self._unreadable:
            yield f"{self._unreadable} unreadable lines of {INPUTS_NAME} were skipped"
        if self._gamepad:
            yield f"{self._gamepad} gamepad events were skipped"
        if self._jump:
            yield (
                f"its clock jumps back by {self._jump:.1f} s after {self._jumped - start:.1f} s, later inputs may not "
                "match the video"
            )
        held = self._held
        if held is not None and (stuck := [name for name in _down_at_the_end(inputs) if name not in held]):
            yield f"the release of {', '.join(stuck)} was not logged, it is treated as held to the end"


def _held(arguments: Any) -> list[str] | None:
    """Return the names of the buttons that START or END lists as down; None without a list, as in older recordings."""
    if not isinstance(arguments, dict):
        return None
    inputs = arguments["inputs"]
    names = [_button("KEYBOARD", code) for code in inputs["keyboard"]]
    names += [_button("MOUSE_BUTTON", code) for code in inputs["mouse"]]
    return [name for name in names if name is not None]


def _down_at_the_end(inputs: Inputs) -> list[str]:
    released = inputs.times[inputs.kinds == RELEASE].max(initial=-math.inf)
    down = []
    for number, name in enumerate(inputs.names):
        mine = (inputs.kinds == BUTTON) & (inputs.values[:, 0] == number)
        if inputs.values[mine, 1][-1] and inputs.times[mine][-1] > released:
            down.append(name)
    return down


def _parse(line: str) -> tuple[float, str, Any]:
    time, event, arguments = line.rstrip("\r\n").split(",", 2)
    arguments = arguments.strip()
    if len(arguments) >= 2 and arguments[0] == arguments[-1] == '"':
        arguments = arguments[1:-1].replace('""', '"')
    seconds = float(time)
    if not math.isfinite(seconds):
        raise ValueError(f"time {time}")
    return seconds, event.strip(), json.loads(arguments or "[]")


def _button(event: str, code: int) -> str | None:
    """Return the name of a key or mouse button, None if it is neither."""
    if event == "KEYBOARD":
        return None if code in NO_KEY else KEYS.get(code, f"KEY_{int(code)}")
    return MOUSE_BUTTONS.get(code, f"MOUSE_{int(code)}")


def _entry(event: str, arguments: list, names: dict[str, int]) -> tuple[int, int, int] | None:
    """Return (kind, value, value) of an event, None if it is ignored; a new button is added to ``names``."""
    if event in ("KEYBOARD", "MOUSE_BUTTON"):
        code, down = arguments
        name = _button(event, code)
        return None if name is None else (BUTTON, names.setdefault(name, len(names)), int(bool(down)))
    if event == "UNFOCUS":  # key-ups go to another window from here on
        return RELEASE, 0, 0
    if event == "MOUSE_MOVE":
        dx, dy = arguments
        return MOVE, _count(dx), _count(dy)
    if event == "SCROLL":
        (amount,) = arguments
        return SCROLL, _count(amount), 0
    return None


def _count(value: float) -> int:
    if abs(value) >= 2**31:
        raise OverflowError(f"{value} is beyond what a mouse reports")
    return int(value)


def order_buttons(names: Iterable[str]) -> list[str]:
    """Sort button names, keys before mouse buttons, and complete the pairs that mirroring swaps."""
    found = set(names)
    for pair in MIRRORED:
        if found & set(pair):
            found |= set(pair)
    return sorted(found, key=lambda name: (name.startswith("MOUSE_"), len(name) > 1, name))


def describe_controls(buttons: list[str]) -> dict:
    """Return the ``controls`` entry of ``dataset.json``."""
    mirror = {left: right for pair in MIRRORED for left, right in (pair, pair[::-1]) if left in buttons}
    return {
        "extension": Controls.extension,
        "buttons": buttons,
        "axes": AXES,
        "unit": "mouse counts, scroll as recorded (positive is up)",
        "timing": TIMING,
        "mirror": {"buttons": mirror, "axes": ["mouse_x"]},
    }


def align(inputs: Inputs, frames: int, fps: float, buttons: list[str]) -> np.ndarray:
    """Give each frame its controls.

    Frame t, shown at t / fps, gets the events after frame t-1 up to its own time, which lead to frame t. A button is 1
    if it was down for any part of that time, so a tap between two frames is not lost; a button whose first event is a
    release was down from the start. All buttons are released when the window loses focus.

    Args:
        inputs: The events.
        frames: Number of frames.
        fps: Frames per second.
        buttons: Names of the columns; the recording's own are among them.

    Returns:
        float32[frames, len(buttons) + 3]: 0 or 1 for each button, then mouse_x, mouse_y and scroll, summed.
    """
    controls = np.zeros((frames, len(buttons) + len(AXES)), np.float32)
    owner = np.ceil(inputs.times * fps - ON_TIME).astype(np.int64)
    for number, name in enumerate(inputs.names):
        pressed = inputs.kinds == BUTTON
        mine = (pressed & (inputs.values[:, 0] == number)) | (inputs.kinds == RELEASE)
        column = controls[:, buttons.index(name)]
        down_since: int | None = None
        events = zip(owner[mine], pressed[mine], inputs.values[mine, 1], strict=True)
        for position, (frame, own, down) in enumerate(events):
            if down:
                down_since = frame if down_since is None else down_since  # held keys repeat their event
            else:
                first = 0 if position == 0 and own else down_since
                if first is not None:
                    column[max(0, first) : max(0, frame + 1)] = 1
                down_since = None
        if down_since is not None:
            column[max(0, down_since) :] = 1
    inside = (owner >= 0) & (owner < frames)
    for kind, axis, value in ((MOVE, 0, 0), (MOVE, 1, 1), (SCROLL, 2, 0)):
        chosen = inside & (inputs.kinds == kind)
        sums = np.bincount(owner[chosen], weights=inputs.values[chosen, value], minlength=frames)
        controls[:, len(buttons) + axis] = sums
    return controls
