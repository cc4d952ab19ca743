"""The protocol: what a client sends arrives, and nothing else does harm."""

import json
import math
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from owl.play import protocol
from owl.play.protocol import Command, Input, Kind, MalformedError, Start


@given(st.lists(st.booleans(), max_size=20), st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_inputs_arrive(buttons: list[bool], axes: list[float]) -> None:
    moved = np.array(axes, np.float32)
    sent = Input(12.5, np.array(buttons, bool), moved, np.clip(moved, -1, 1))
    found = protocol.parse(protocol.input_message(sent), len(buttons), len(axes))
    assert isinstance(found, Input)
    assert found.time == 12.5
    assert found.buttons.tolist() == buttons
    assert found.moved.tolist() == axes
    assert found.sticks.tolist() == sent.sticks.tolist()


def test_commands_arrive() -> None:
    for command in (
        Command("play"),
        Command("reset", start=3, seed=2**31),
        Command("settings", steps=2, guidance=1.5, context_noise=0.1, decoder="a"),
        Command("settings", guidance=2),
        Command("settings", shift=3.5, sampler="euler"),
        Command("record", on=False),
    ):
        assert protocol.parse(protocol.command_message(command), 2, 1) == command


def test_pictures_to_start_with_arrive() -> None:
    assert protocol.parse(protocol.start_message(b"png"), 2, 1) == Start(b"png")


def test_frames_arrive() -> None:
    parts = dict(zip(protocol.PARTS, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), strict=True))
    number, time, found, jpeg = protocol.parse_frame(protocol.frame_message(7, 3.25, parts, b"jpeg"))
    assert (number, time, found, jpeg) == (7, 3.25, parts, b"jpeg")
    assert math.isnan(protocol.parse_frame(protocol.frame_message(0, math.nan, {}, b""))[1])


def test_sounds_arrive() -> None:
    sound = np.random.default_rng(0).uniform(-1, 1, (2, 50)).astype(np.float32)
    message = protocol.sound_message(9, sound)
    assert (message[0], len(message)) == (Kind.SOUND, 5 + 2 * 2 * 50)
    number, found = protocol.parse_sound(message, 2)
    assert number == 9
    assert np.abs(found - sound).max() <= 0.5 / 32767 + 1e-7
    loud = protocol.parse_sound(protocol.sound_message(1, np.array([[-3.0, 3.0]])), 1)[1]
    assert loud.tolist() == [[-1.0, 1.0]]  # clipped, not wrapped


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_malformed(content: bytes) -> None:
    for message in (content, b"\x01" + content, b"\x02" + content):
        with suppress(MalformedError):  # and no other error
            assert isinstance(protocol.parse(message, 9, 1), Input | Command | Start)


VALUES = st.sampled_from([None, True, 0, -1, 2**70, 0.5, math.nan, math.inf, "", "a", [], [1], {}])


@given(st.dictionaries(st.sampled_from([*protocol.TYPES, "other"]), VALUES), st.sampled_from(protocol.COMMANDS))
def test_fields_of_commands_have_their_types(fields: dict, name: str) -> None:
    try:
        found = protocol.parse(bytes([Kind.COMMAND]) + json.dumps(fields | {"name": name}).encode(), 2, 1)
    except MalformedError:
        return
    assert isinstance(found, Command)
    for field, value in fields.items():
        assert field == "name" or type(value) in protocol.TYPES[field]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "empty"),
        (b"\x07", "type 7 is unknown"),
        (b"\x01" + bytes(8 + 8), "17 bytes, expected 18"),
        (b"\x01" + bytes(8 + 8) + b"\x04", "more than 2 buttons"),
        (b"\x01" + bytes(8) + np.float32(np.nan).tobytes() + bytes(5), "NaN"),
        (b"\x01" + np.float64(np.inf).tobytes() + bytes(9), "NaN or infinity"),
        (b"\x01" + bytes(12) + np.float32(1.5).tobytes() + b"\0", "stick outside of -1 to 1"),
        (b"\x01" + bytes(12) + np.float32(np.nan).tobytes() + b"\0", "stick outside of -1 to 1"),
        (b"\x02{", "not JSON"),
        (b"\x02" + b"[" * 4000, "not JSON"),
        (b"\x02[]", "no name"),
        (b'\x02{"name": "destroy"}', "no name"),
        (b'\x02{"name": "reset", "seed": "1"}', "seed of a command is no int"),
        (b'\x02{"name": "reset", "seed": true}', "seed of a command is no int"),
        (b'\x02{"name": "settings", "guidance": NaN}', "guidance"),
        (b'\x02{"name": "reset", "file": "/etc"}', "unknown field file"),
    ],
)
def test_what_is_wrong_is_reported(message: bytes, reason: str) -> None:
    with pytest.raises(MalformedError, match=reason):
        protocol.parse(message, 2, 1)
