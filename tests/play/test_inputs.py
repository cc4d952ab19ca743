"""What is held and moved reaches exactly one frame, whenever frames come."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from owl.play.inputs import Inputs
from owl.play.protocol import Input


def put(inputs: Inputs, held: bool, moved: float, time: float = 0.0, stick: float = 0.0) -> None:
    inputs.put(Input(time, np.array([held]), np.array([moved], np.float32), np.array([stick], np.float32)))


@given(st.lists(st.tuples(st.booleans(), st.integers(-9, 9), st.booleans()), max_size=30))
def test_movements_are_summed_and_short_presses_are_kept(events: list[tuple[bool, int, bool]]) -> None:
    inputs = Inputs(1, [4.0])
    taken, held, pressed = 0.0, False, False
    for down, moved, frame in events:
        put(inputs, down, moved)
        held, pressed = down, pressed or down
        if frame:
            sample = inputs.take()
            taken += float(sample.axes[0])
            assert bool(sample.buttons[0]) == pressed
            pressed = held
    taken += float(inputs.take().axes[0])
    assert taken == sum(moved for _, moved, _ in events)


def test_the_oldest_new_input_is_timed() -> None:
    inputs = Inputs(1, [4.0])
    assert math.isnan(inputs.take().time)
    put(inputs, True, 0, time=5.0)
    put(inputs, True, 0, time=6.0)
    sample = inputs.take()
    assert sample.time == 5.0
    assert sample.waited >= 0
    following = inputs.take()
    assert math.isnan(following.time)
    assert following.waited == 0
    assert following.buttons[0]  # still held


def test_a_stick_moves_every_frame_alike_for_as_long_as_it_is_deflected() -> None:
    inputs = Inputs(1, [4.0])
    put(inputs, False, 0, stick=-0.5)
    put(inputs, False, 1, stick=-0.5)
    assert [float(inputs.take().axes[0]) for _ in range(3)] == [-1.0, -2.0, -2.0]
    put(inputs, False, 0, stick=1.0)
    put(inputs, False, 0, stick=0.0)  # released before the next frame
    assert [float(inputs.take().axes[0]) for _ in range(2)] == [4.0, 0.0]


def test_a_client_that_leaves_releases_everything() -> None:
    inputs = Inputs(1, [4.0])
    put(inputs, True, 3, stick=1.0)
    inputs.release()
    sample = inputs.take()
    assert not sample.buttons.any()
    assert not sample.axes.any()
    assert math.isnan(sample.time)
