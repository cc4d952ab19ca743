"""The latest state of the player's controls, sampled just before each frame."""

import math
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from owl.play.protocol import Input


class Sample(NamedTuple):
    """Controls of a frame.

    Attributes:
        buttons: bool[number of buttons], down at any time since the last sample.
        axes: float32[number of axes], sum of movements since the last sample and the movement of the sticks.
        time: Client's time of the oldest input that is new in this sample, in milliseconds; NaN if none is.
        waited: Seconds since that input arrived.
    """

    buttons: np.ndarray
    axes: np.ndarray
    time: float
    waited: float


class Inputs:
    """Controls that one thread sets and another one samples.

    A button that was pressed and released between two samples is down in the next one, as in recorded data. The same
    holds for the largest deflection of a stick.

    Args:
        buttons: Number of buttons.
        full: For each axis, the movement per frame of a fully deflected stick.
    """

    def __init__(self, buttons: int, full: Sequence[float]) -> None:
        axes = len(full)
        self._full = np.array(full, np.float32)
        self._lock = threading.Lock()
        self._held = np.zeros(buttons, bool)
        self._pressed = np.zeros(buttons, bool)
        self._moved = np.zeros(axes, np.float32)
        self._sticks = np.zeros(axes, np.float32)
        self._deflected = np.zeros(axes, np.float32)
        self._time, self._arrived = math.nan, 0.0

    def put(self, given: Input) -> None:
        """Set the held buttons and add movements."""
        with self._lock:
            self._held = given.buttons
            self._pressed = self._pressed | given.buttons
            self._moved = self._moved + given.moved
            self._sticks = given.sticks
            self._deflected = np.where(np.abs(given.sticks) > np.abs(self._deflected), given.sticks, self._deflected)
            if math.isnan(self._time):
                self._time, self._arrived = given.time, time.perf_counter()

    def take(self) -> Sample:
        """Return the controls of the next frame and forget what has happened so far."""
        with self._lock:
            waited = 0.0 if math.isnan(self._time) else time.perf_counter() - self._arrived
            sample = Sample(self._pressed, self._moved + self._deflected * self._full, self._time, waited)
            self._forget()
        return sample

    def release(self) -> None:
        """Release all buttons and forget all movements, as when the player leaves."""
        with self._lock:
            self._held = np.zeros_like(self._held)
            self._sticks = np.zeros_like(self._sticks)
            self._forget()

    def _forget(self) -> None:
        """Start again with what is held now."""
        self._pressed, self._deflected = self._held.copy(), self._sticks.copy()
        self._moved, self._time = np.zeros_like(self._moved), math.nan
