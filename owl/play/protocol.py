"""Messages between the page and the server: version 1, the WebSocket subprotocol ``owl-play.1``.

Every message is binary and little-endian; its first byte is its type. A client ignores types, and fields of ``STATE``,
that it does not know, so that they can be added without a new version.

To the server:

- ``INPUT``: float64 time of the client's oldest event in the message in milliseconds, float32 movement of each axis
  since the last message, float32 deflection of the stick of each axis, and the held buttons as bits, the first in the
  lowest bit of the first byte.
- ``COMMAND``: a JSON object with "name" and the fields of the command, see `Command`.
- ``START``: a picture as JPEG or PNG, of the (height, width) that "start_size" in ``STATE`` names: start with it.

The server closes connections that send more than ``LARGEST`` bytes in a message, or ``PIXEL`` bytes for each pixel of
"start_size" where that is more.

To the client:

- ``FRAME``: uint32 number of the frame since the start, float64 time of the oldest ``INPUT`` that is new in it (NaN if
  none is), float32 milliseconds of each of ``PARTS``, and the picture as JPEG.
- ``STATE``: a JSON object, what the page shows beside the picture.
- ``NOTICE``: a sentence for the person, UTF-8.
- ``SOUND``: uint32 number of the frame with which it is heard, and int16 samples, those of all channels in turn, at the
  rate that "sound" in ``STATE`` names. It comes after its ``FRAME``. It continues the sound of the preceding number;
  after any other number the rollout has jumped, or sound was dropped.
- ``METERS``: a JSON list of what `owl.play.meters.Meters` has measured, an object for each world from left to right. It
  comes about once in a second while frames are made, to clients that requested it with the command "meters"; "meters"
  in ``STATE`` names what is measured, and servers without that field do not know the command.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np

SUBPROTOCOL = "owl-play.1"
LARGEST = 2**18
"""Bytes of the largest message that the server accepts, unless a picture to start with may be larger."""
PIXEL = 4
"""Bytes of the largest picture to start with, for each of its pixels: no JPEG or PNG of that size needs more."""
PARTS = ("wait", "game", "commit", "denoise", "decode", "encode")
"""Times of a frame: from the arrival of its input to the start of the frame, then of the real game, or of the parts of
a world model, and of JPEG."""
COMMANDS = ("play", "watch", "pause", "resume", "step", "reset", "rewind", "settings", "record", "meters")
LOUDEST = 2**15 - 1
"""Sample of full amplitude."""
REASON = 120
"""Bytes of the longest reason of a close; WebSocket allows 123."""


class Kind(IntEnum):
    """First byte of a message."""

    INPUT = 1
    COMMAND = 2
    START = 3
    FRAME = 16
    STATE = 17
    NOTICE = 18
    SOUND = 19
    METERS = 20


class Close(IntEnum):
    """Codes with which the server closes a connection, beside those of WebSocket."""

    MALFORMED = 4400
    TOO_MANY_MESSAGES = 4429
    FULL = 4503
    VERSION = 4505


class MalformedError(Exception):
    """A message that no page sends; its text becomes the reason of the close."""


@dataclass(frozen=True)
class Input:
    """What the player did since the last message.

    Attributes:
        time: Time of the oldest event, in milliseconds of the client's clock.
        buttons: bool[number of buttons], held at the time of sending.
        moved: float32[number of axes], sum of the movements of a mouse, in the unit of each axis.
        sticks: float32[number of axes] in [-1, 1], deflection of a stick at the time of sending.
    """

    time: float
    buttons: np.ndarray
    moved: np.ndarray
    sticks: np.ndarray


@dataclass(frozen=True)
class Start:
    """A picture to start with.

    Attributes:
        content: JPEG or PNG.
    """

    content: bytes


@dataclass(frozen=True)
class Command:
    """A request of the page.

    Attributes:
        name: "play" and "watch" take and leave the controls; "pause", "resume"; "step" makes one frame; "reset" starts
            at a ``start`` with a ``seed``; "rewind" returns to a ``moment``; "settings" changes the given ones;
            "record" turns recording ``on`` or off; "meters" turns ``METERS`` ``on`` or off, for this client alone.
        start: Number of the start scene.
        seed: Seed of all noise.
        moment: Number of a moment of the timeline.
        on: Whether to record, or to measure.
        steps: Evaluations of the network per frame.
        context_noise: Noise level at which frames become context.
        guidance: Weight of classifier-free guidance.
        decoder: Name of a decoder.
        shift: Shift of the noise levels towards noise.
        sampler: Name of the sampler.
    """

    name: str
    start: int | None = None
    seed: int | None = None
    moment: int | None = None
    on: bool | None = None
    steps: int | None = None
    context_noise: float | None = None
    guidance: float | None = None
    decoder: str | None = None
    shift: float | None = None
    sampler: str | None = None


SETTINGS = ("steps", "context_noise", "guidance", "decoder", "shift", "sampler")
"""Fields of a command that change the settings of the same names."""
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("start", "seed", "moment", "steps"), (int,)),
    **dict.fromkeys(("context_noise", "guidance", "shift"), (int, float)),
    **dict.fromkeys(("name", "decoder", "sampler"), (str,)),
    "on": (bool,),
}


def parse(message: bytes, buttons: int, axes: int) -> Input | Command | Start:
    """Parse a message of a client.

    Args:
        message: The message.
        buttons: Number of buttons of the world.
        axes: Number of its axes.

    Raises:
        MalformedError: It is not a message of this version.
    """
    if not message:
        raise MalformedError("the message is empty")
    if message[0] == Kind.INPUT:
        return _parse_input(message, buttons, axes)
    if message[0] == Kind.COMMAND:
        return _parse_command(message[1:])
    if message[0] == Kind.START:
        return Start(message[1:])
    raise MalformedError(f"type {message[0]} is unknown, expected 1 (input), 2 (command) or 3 (start)")


def _parse_input(message: bytes, buttons: int, axes: int) -> Input:
    expected = 9 + 8 * axes + -(-buttons // 8)
    if len(message) != expected:
        raise MalformedError(f"an input has {len(message)} bytes, expected {expected}")
    (time,) = struct.unpack_from("<d", message, 1)
    moved, sticks = np.frombuffer(message, "<f4", 2 * axes, 9).astype(np.float32).reshape(2, axes)
    if not (math.isfinite(time) and np.isfinite(moved).all()):
        raise MalformedError("an input holds NaN or infinity")
    if not (np.abs(sticks) <= 1).all():
        raise MalformedError("an input holds a stick outside of -1 to 1")
    bits = np.unpackbits(np.frombuffer(message, np.uint8, offset=9 + 8 * axes), bitorder="little")
    if bits[buttons:].any():
        raise MalformedError(f"an input holds more than {buttons} buttons")
    return Input(time, bits[:buttons].astype(bool), moved, sticks)


def _parse_command(text: bytes) -> Command:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise MalformedError("a command is not JSON") from None
    if not isinstance(content, dict) or content.get("name") not in COMMANDS:
        raise MalformedError(f"a command has no name of {', '.join(COMMANDS)}")
    for name, value in content.items():
        if name not in TYPES:
            raise MalformedError(f"a command has the unknown field {name[:20]}")
        if type(value) not in TYPES[name] or (isinstance(value, float) and not math.isfinite(value)):
            raise MalformedError(f"the field {name} of a command is no {' or '.join(t.__name__ for t in TYPES[name])}")
    return Command(**content)


def frame_message(number: int, time: float, milliseconds: Mapping[str, float], jpeg: bytes) -> bytes:
    """Return a ``FRAME``."""
    parts = (milliseconds.get(part, 0.0) for part in PARTS)
    return struct.pack(f"<BId{len(PARTS)}f", Kind.FRAME, number, time, *parts) + jpeg


def state_message(state: Mapping[str, Any]) -> bytes:
    """Return a ``STATE``."""
    return bytes([Kind.STATE]) + json.dumps(state).encode()


def notice_message(text: str) -> bytes:
    """Return a ``NOTICE``."""
    return bytes([Kind.NOTICE]) + text.encode()


def sound_message(number: int, sound: np.ndarray) -> bytes:
    """Return a ``SOUND`` of float[channels, samples] in [-1, 1], clipped."""
    samples = np.rint(sound.T.clip(-1, 1) * LOUDEST).astype("<i2")
    return struct.pack("<BI", Kind.SOUND, number) + samples.tobytes()


def meters_message(values: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a ``METERS``."""
    return bytes([Kind.METERS]) + json.dumps(values).encode()


def input_message(given: Input) -> bytes:
    """Return an ``INPUT``, as a client sends it."""
    bits = np.packbits(given.buttons.astype(bool), bitorder="little").tobytes()
    axes = np.concatenate([given.moved, given.sticks]).astype("<f4").tobytes()
    return struct.pack("<Bd", Kind.INPUT, given.time) + axes + bits


def command_message(command: Command) -> bytes:
    """Return a ``COMMAND``, as a client sends it."""
    content = {item.name: getattr(command, item.name) for item in fields(command)}
    return bytes([Kind.COMMAND]) + json.dumps({n: v for n, v in content.items() if v is not None}).encode()


def start_message(content: bytes) -> bytes:
    """Return a ``START``, as a client sends it."""
    return bytes([Kind.START]) + content


def parse_frame(message: bytes) -> tuple[int, float, dict[str, float], bytes]:
    """Take a ``FRAME`` apart, as a client does: the arguments of `frame_message`."""
    layout = struct.Struct(f"<BId{len(PARTS)}f")
    _, number, time, *parts = layout.unpack_from(message)
    return number, time, dict(zip(PARTS, parts, strict=True)), message[layout.size :]


def parse_sound(message: bytes, channels: int) -> tuple[int, np.ndarray]:
    """Take a ``SOUND`` apart, as a client does: the arguments of `sound_message`."""
    _, number = struct.unpack_from("<BI", message)
    return number, np.frombuffer(message, "<i2", offset=5).reshape(-1, channels).T.astype(np.float32) / LOUDEST
