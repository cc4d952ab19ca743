"""Controls of the player: buttons and axes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from owl.data import codecs, game
from owl.data.modalities.base import RecordedModality, Sampling, Shapes, View, with_shape
from owl.errors import OwlError


@dataclass(frozen=True)
class Mirror:
    """Left-right mirroring of controls.

    Attributes:
        buttons: int64[B], index of the button whose state each button takes.
        axes: float32[A], factor of each axis, 1 or -1.
    """

    buttons: np.ndarray
    axes: np.ndarray

    @classmethod
    def from_description(cls, description: Mapping[str, Any], url: str) -> "Mirror":
        """Read the mirror table of dataset.json's controls.

        Raises:
            OwlError: The table is missing, or names buttons or axes that the dataset does not have.
        """
        if "mirror" not in description:
            raise OwlError(
                "controls.mirror",
                f"the controls of {url} have no mirror table, flip needs one; add it to dataset.json or set flip to 0",
            )
        buttons, axes, table = description["buttons"], description["axes"], description["mirror"]
        try:
            order = np.arange(len(buttons))
            for left, right in table.get("buttons", {}).items():
                order[buttons.index(left)], order[buttons.index(right)] = buttons.index(right), buttons.index(left)
            factors = np.ones(len(axes), np.float32)
            for axis in table.get("axes", []):
                factors[axes.index(axis)] = -1
        except ValueError as error:
            raise OwlError(
                "controls.mirror",
                f"the mirror table of {url} does not fit its buttons and axes ({error}); correct dataset.json",
            ) from error
        return cls(order, factors)


class Controls(RecordedModality):
    """Controls float32[buttons + axes] per frame: buttons 0 or 1, then axes; those of frame t lead to frame t.

    Windows contain "buttons": float32[T, B] and "axes": float32[T, A]. If a stride skips frames, a button is 1 if it
    was down in any frame since the previous frame of the window, and axes are summed. Mirroring uses the ``mirror``
    table.

    Raises:
        OwlError: Mirroring is enabled, and the table is missing or does not match.
    """

    extension = "controls.npy"
    encode = staticmethod(codecs.encode_array)

    def __init__(self, name: str, description: Mapping[str, Any], sampling: Sampling) -> None:
        super().__init__(name, description, sampling)
        self._buttons, self._axes = len(description["buttons"]), len(description["axes"])
        self._mirror = Mirror.from_description(description, sampling.url) if sampling.flip > 0 else None

    @classmethod
    def describe_recorded(cls, size: tuple[int, int]) -> dict[str, Any]:
        return {
            "extension": cls.extension,
            "buttons": list(game.BUTTONS),
            "axes": list(game.AXES),
            "mirror": {"buttons": {"MOVE_LEFT": "MOVE_RIGHT", "MOVE_RIGHT": "MOVE_LEFT"}, "axes": list(game.AXES)},
            "unit": "buttons 0 or 1; mouse_x degrees turned to the right in the tic",
            "timing": "frame t holds the controls of the tic that brought frame t about from frame t-1",
        }

    @classmethod
    def record(cls, frame: game.Frame, previous: game.Frame) -> np.ndarray:
        return np.concatenate([frame.buttons, frame.axes])

    def frames(self, first: int, last: int) -> range:
        return range(first, last + 1)

    def shapes(self) -> Shapes:
        length = self.sampling.length
        return {
            "buttons": ((length, self._buttons), torch.float32),
            "axes": ((length, self._axes), torch.float32),
        }

    def decode(self, content: bytes | memoryview) -> np.ndarray:
        return with_shape(codecs.decode_array(content), (self._buttons + self._axes,))

    def assemble(self, frames: Iterable[np.ndarray], view: View, into: dict[str, np.ndarray], before: int = 0) -> None:
        controls = np.stack(list(frames)).astype(np.float32)
        buttons, axes = controls[:, : self._buttons], controls[:, self._buttons :]
        if view.mirrored and self._mirror is not None:
            buttons, axes = buttons[:, self._mirror.buttons], axes * self._mirror.axes
        if self.sampling.stride > 1:
            # the controls of frame t lead to frame t: those of skipped frames lead to the next frame of the window
            starts = np.concatenate([[0], np.arange(1, len(buttons), self.sampling.stride)])
            buttons = np.maximum.reduceat(buttons, starts, axis=0)
            axes = np.add.reduceat(axes, starts, axis=0)
        into["buttons"][:] = buttons
        into["axes"][:] = axes
