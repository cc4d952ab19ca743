"""What can be played: a world gives one picture for the controls of one frame."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from owl.errors import OwlError
from owl.models.sampling import Sampling

if TYPE_CHECKING:
    from owl.play.meters import Reference

LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Settings(Sampling):
    """How a learned world makes its frames.

    Attributes:
        decoder: Name of the decoder.
    """

    decoder: str = ""


@dataclass(frozen=True)
class SoundFormat:
    """What a world sounds like.

    Attributes:
        sample_rate: Samples per second.
        channels: 1 or 2.
    """

    sample_rate: int
    channels: int


@dataclass(frozen=True)
class Description:
    """What a page must know to play a world.

    Attributes:
        kind: "world model", "world models" side by side, or "game".
        name: For the title.
        device: In words.
        buttons: Names of the buttons.
        axes: For each axis by name, the movement per frame of a fully deflected stick, in the unit of the axis.
        fps: Frames per second of real time.
        size: (H, W) of the pictures.
        starts: A picture of each start scene, uint8[H, W, 3]; a world without scenes has one start. `World.add_start`
            adds to it.
        decoders: Names of the decoders.
        origin: How to make the world again, for the action log; see `owl.play.log`.
        sound: Format of the sound; None: a silent world.
        names: Names of the worlds side by side, from left to right; empty: one world alone.
    """

    kind: str
    name: str
    device: str
    buttons: list[str]
    axes: dict[str, float]
    fps: float
    size: tuple[int, int]
    origin: dict[str, Any]
    starts: list[np.ndarray] = field(default_factory=list)
    decoders: list[str] = field(default_factory=list)
    sound: SoundFormat | None = None
    names: list[str] = field(default_factory=list)

    @property
    def start_size(self) -> tuple[int, int]:
        """(H, W) of a picture to start with: that of the start scenes, without them that of the pictures."""
        return self.starts[0].shape[:2] if self.starts else self.size


@dataclass(frozen=True)
class Picture:
    """A frame of a world.

    Attributes:
        rgb: uint8[H, W, 3].
        seconds: Time of each part of its making: "game", or "commit", "denoise" and "decode".
        hear: Returns the sound, float32[channels, samples] in [-1, 1], which follows that of the previous frame, from
            any thread; may wait until it is decoded. None at a start, and of a silent world.
    """

    rgb: np.ndarray
    seconds: dict[str, float] = field(default_factory=dict)
    hear: Callable[[], np.ndarray] | None = None

    @property
    def sound(self) -> np.ndarray | None:
        """What `hear` returns, None without it."""
        return None if self.hear is None else self.hear()


class World(ABC):
    """A world that one person plays. All calls come from one thread.

    Attributes:
        description: What the page must know.
        settings: Those of the next frame.
        references: What `owl.play.meters.Meters` compares the frames with, one for each world that they show; empty:
            they are not measured.
    """

    description: Description
    settings: Settings
    references: Sequence[Reference] = ()

    @abstractmethod
    def reset(self, start: int, seed: int) -> Picture:
        """Start at a start scene; equal seeds and controls give equal pictures.

        Raises:
            OwlError: There is no such start, or the seed is not of 0 to ``LARGEST_SEED``.
        """

    @abstractmethod
    def step(self, buttons: np.ndarray, axes: np.ndarray) -> Picture:
        """Make the frame that bool[number of buttons] and float32[number of axes] lead to."""

    @abstractmethod
    def snapshot(self) -> Any:
        """Return the state, for `restore`."""

    @abstractmethod
    def restore(self, snapshot: Any) -> None:
        """Return to a state, with its settings."""

    @abstractmethod
    def snapshot_bytes(self) -> int:
        """Return the memory that a snapshot takes."""

    def add_start(self, rgb: np.ndarray) -> None:
        """Add a start scene, in which nothing but a picture is known.

        Args:
            rgb: uint8[H, W, 3] of the size of the other starts.

        Raises:
            OwlError: This world does not start with pictures.
        """
        raise OwlError(
            "play.picture", f"a {self.description.kind} cannot start with a picture; choose one of its start scenes"
        )

    def remove_start(self) -> None:
        """Remove the start scene that was added last."""
        self.description.starts.pop()

    def change(self, settings: Settings) -> None:
        """Use other settings from the next frame on.

        Raises:
            OwlError: They are impossible in this world.
        """
        if settings != self.settings:
            raise OwlError(
                "play.settings", f"a {self.description.kind} got settings {asdict(settings)}, expected none; omit them"
            )

    def close(self) -> None:  # noqa: B027  (most worlds need nothing)
        """Free what the world holds."""

    def check_start(self, start: int, seed: int) -> None:
        """Check the arguments of `reset`.

        Raises:
            OwlError: There is no such start, or the seed is out of range.
        """
        count = max(1, len(self.description.starts))
        if not 0 <= start < count:
            raise OwlError("play.start", f"there is no start {start}, expected 0 to {count - 1}; choose another")
        if not 0 <= seed <= LARGEST_SEED:
            raise OwlError("arguments.seed", f"seed is {seed}, expected 0 to {LARGEST_SEED}; use another seed")
