"""Meters of what is played: whether the frames follow the controls, and how far they are from true frames."""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from owl.errors import OwlError
from owl.metrics.controls import ButtonAccuracy
from owl.metrics.frechet import EfficientNetLite0Features
from owl.models.inverse_dynamics import AFTER, BEFORE
from owl.rollout.inverse_dynamics import InverseDynamicsReader
from owl.viz.film import apart

SECONDS = 5.0
"""Seconds of measured play that a value describes."""
PERIOD = 1.0
"""Seconds from one measurement to the next, at least."""
REST = 9.0
"""Rest after a measurement, as a multiple of the time it took: measuring takes a tenth of the time of one core."""
TRUE_FRAMES = 64
"""True frames with which generated ones are compared."""
TOGETHER = 8
"""Pictures of which features are computed at once: bounds the memory."""
NICENESS = 5
"""Added to that of the thread on Linux, so that the generator comes first where there is too little time for both."""


@dataclass(frozen=True)
class Reference:
    """What the frames of a world are compared with.

    Attributes:
        true_frames: Returns frames of the data, uint8[N, 3, H, W], and a number of the episode of each, int[N]. The
            meters' thread calls it.
        reader: Reads the controls from the frames; None: the agreement is not measured.
        device: Where features are computed.
    """

    true_frames: Callable[[], tuple[Tensor, Tensor]]
    reader: InverseDynamicsReader | None
    device: torch.device


class Reading(NamedTuple):
    """Controls of frames: given, and read from the frames.

    Attributes:
        buttons: bool[T, number of buttons], given.
        axes: float[T, number of axes], given, in the unit of each axis.
        read_buttons: bool[T, number of buttons].
        read_axes: float[T, number of axes].
    """

    buttons: Tensor
    axes: Tensor
    read_buttons: Tensor
    read_axes: Tensor


def agreement(reader: InverseDynamicsReader, reading: Reading) -> dict[str, float]:
    """Compute how often the controls that are read from frames are those that were given.

    Controls that were neither given nor read in any of the frames are left out.

    Returns:
        For each axis the fraction of frames with the correct direction (negative, none or positive, see
        `owl.metrics.controls.AxisAccuracy`); for each button the balanced accuracy of
        `owl.metrics.controls.ButtonAccuracy`, where it was always or never down the accuracy of that state.
    """
    given, read = reader.direction(reading.axes), reader.direction(reading.read_axes)
    buttons = ButtonAccuracy(reader.network.buttons)
    buttons.update(reading.read_buttons, reading.buttons)
    values = torch.cat([(given == read).float().mean(0), (buttons.correct / buttons.frames).nanmean(-1)])
    used = torch.cat([((given != 0) | (read != 0)).any(0), (reading.buttons | reading.read_buttons).any(0)])
    names = [*reader.network.axes, *reader.network.buttons]
    return {name: float(value) for name, value, shown in zip(names, values, used, strict=True) if shown}


class Drift:
    """How far pictures are from true frames, in multiples of how far true frames are from each other.

    drift(g) = min over r of |f(g) - f(r)| / mean over r of min over r' of |f(r) - f(r')|

    r and r' are true frames, r' of another episode than r, and f are the features of `EfficientNetLite0Features`. A
    world that shows what the data shows has about 1 or less, blur and artefacts have more. The distance to the nearest
    true frame rates single frames, as the realism score of Kynkäänniemi et al. 2019 ("Improved precision and recall
    metric", eq. 3) does; the Fréchet distance needs as many frames as a rollout has.

    Args:
        features: On their device.
        frames: True frames, uint8[N, 3, H, W].
        episodes: A number of the episode of each, int[N].

    Attributes:
        typical: The denominator; infinite if all frames are of one episode.
    """

    def __init__(self, features: EfficientNetLite0Features, frames: Tensor, episodes: Tensor) -> None:
        self._features = features
        self._true = features.of_pictures(frames, TOGETHER)
        distances = torch.cdist(self._true, self._true)
        distances[episodes[:, None] == episodes] = torch.inf
        self.typical = float(distances.amin(1).mean())

    def of(self, pictures: Tensor) -> list[float]:
        """Return the drift of each of uint8[N, 3, H, W]."""
        found = self._features.of_pictures(pictures, TOGETHER)
        values: list[float] = (torch.cdist(found, self._true).amin(1) / self.typical).tolist()
        return values


class Shown(NamedTuple):
    """A frame and the controls that led to it: uint8[H, W, 3], bool[number of buttons], float32[number of axes]."""

    rgb: np.ndarray
    buttons: np.ndarray
    axes: np.ndarray


class Stretch:
    """Frames that follow each other, and what was measured of them.

    Attributes:
        frames: Those that have not been measured, and the last ones before them; of too many, the oldest are dropped.
        read: For each world the newest controls that were read, a `Reading` of each frame.
        drift: For each world the newest values of drift.
    """

    def __init__(self, worlds: int, fps: float) -> None:
        self.frames: deque[Shown] = deque(maxlen=round(2 * PERIOD * fps) + BEFORE + AFTER)
        self.read: list[deque[Reading]] = [deque(maxlen=max(1, round(SECONDS * fps))) for _ in range(worlds)]
        self.drift: list[deque[float]] = [deque(maxlen=round(SECONDS / PERIOD)) for _ in range(worlds)]

    def take(self) -> list[Shown]:
        """Return all frames, and keep the last ones, which the next ones need as neighbours."""
        taken = list(self.frames)
        for _ in range(len(taken) - BEFORE - AFTER):
            self.frames.popleft()
        return taken


class Meters:
    """Measure what is played, in a thread of its own that drops frames rather than delaying any.

    Values describe the last ``SECONDS`` that were measured since a jump.

    Args:
        references: One for each world that a frame shows from left to right; none: nothing is measured.
        fps: Frames per second.
        report: Called with the values of each world, after each measurement: "agreement", the mean of the values of
            `agreement`, "controls", these values by name, and "drift", the mean of `Drift`; None is not known.
        notice: Called with the sentence of an error that ends the measurements.
        failed: Called with any other error.

    Attributes:
        names: Which of "agreement" and "drift" are measured.
    """

    def __init__(
        self,
        references: Sequence[Reference],
        fps: float,
        report: Callable[[list[dict[str, Any]]], None],
        notice: Callable[[str], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.names = ["drift"] if references else []
        if any(reference.reader for reference in references):
            self.names = ["agreement", *self.names]
        self._references, self._fps = references, fps
        self._report, self._notice, self._failed = report, notice, failed
        self._lock, self._over = threading.Lock(), threading.Event()
        self._watched = False
        self._drifts: list[Drift] = []
        self._thread = threading.Thread(target=self._run, name="owl-meters", daemon=True)
        self.cut()

    def begin(self) -> None:
        """Start the thread, if there is something to measure."""
        if self._references:
            self._thread.start()

    def watch(self, watched: bool) -> None:
        """Measure from now on, or no longer: without viewers nothing is computed."""
        if watched != self._watched:
            self.cut()
            self._watched = watched

    def cut(self) -> None:
        """Forget the frames so far: the next one does not follow them."""
        with self._lock:
            self._stretch = Stretch(len(self._references), self._fps)

    def add(self, rgb: np.ndarray, buttons: np.ndarray, axes: np.ndarray) -> None:
        """Add a frame, as `Shown`; returns at once."""
        if self._watched:
            with self._lock:
                self._stretch.frames.append(Shown(rgb, buttons, axes))

    def close(self) -> None:
        """End the thread."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        if sys.platform == "linux":  # of this thread; elsewhere of the whole process
            os.nice(NICENESS)
        rest = PERIOD
        try:
            while not self._over.wait(rest):
                begin = time.perf_counter()
                if self._watched:
                    self._measure()
                rest = max(PERIOD, REST * (time.perf_counter() - begin))
        except OwlError as error:  # such as damaged data; the world can be played without meters
            self._notice(str(error))
        except BaseException as error:
            self._failed(error)

    def _measure(self) -> None:
        if not self._drifts:
            features = EfficientNetLite0Features().to(self._references[0].device)
            self._drifts = [Drift(features, *each.true_frames()) for each in self._references]
        with self._lock:
            stretch = self._stretch
            shown = stretch.take()
        if len(shown) <= BEFORE + AFTER:
            return
        worlds = len(self._references)
        clips = np.stack([apart(frame.rgb, worlds) for frame in shown], 1)  # worlds, T, H, W, 3
        for number, reference in enumerate(self._references):
            clip = torch.from_numpy(clips[number]).movedim(-1, 1)
            stretch.drift[number].extend(self._drifts[number].of(clip[-1:]))
            if reference.reader is not None:
                stretch.read[number].extend(read(reference.reader, clip, shown))
        with self._lock:
            current = stretch is self._stretch
        if current:  # no jump meanwhile
            self._report([self._values(stretch, number) for number in range(worlds)])

    def _values(self, stretch: Stretch, world: int) -> dict[str, Any]:
        reader, readings, drift = self._references[world].reader, stretch.read[world], stretch.drift[world]
        controls: dict[str, float] = {}
        if reader is not None and readings:
            controls = agreement(reader, Reading(*map(torch.stack, zip(*readings, strict=True))))
        return {
            "agreement": float(np.mean(list(controls.values()))) if controls else None,
            "controls": controls,
            "drift": float(np.mean(drift)) if np.isfinite(self._drifts[world].typical) else None,
        }


def read(reader: InverseDynamicsReader, clip: Tensor, shown: Sequence[Shown]) -> list[Reading]:
    """Read the controls of frames that follow each other.

    Args:
        reader: The reader.
        clip: The frames, uint8[T, 3, H, W].
        shown: The frames with their controls, T.

    Returns:
        A reading of each frame but the first two and the last one, which have too few neighbours.
    """
    buttons, axes = reader.read(clip, BEFORE)
    known = shown[BEFORE:-AFTER]
    return [
        Reading(torch.from_numpy(frame.buttons), torch.from_numpy(frame.axes), read_buttons.bool(), read_axes)
        for frame, read_buttons, read_axes in zip(known, buttons[:-AFTER], axes[:-AFTER], strict=True)
    ]
