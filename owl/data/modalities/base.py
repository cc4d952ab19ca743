"""What every modality says of itself: how a member is stored, and what a window delivers of it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from owl.errors import OwlError

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of tensors by name."""


@dataclass(frozen=True)
class Sampling:
    """What is asked of a dataset: which frames make a window, and how its pictures are delivered.

    Attributes:
        url: The dataset's folder, for messages.
        fps: Stored frames per second.
        stored: (H, W) of the stored rgb frames.
        length: Frames in a window (T).
        stride: Stored frames from one frame of a window to the next.
        resize: (h, w) of delivered pictures before the crop; None keeps the stored size.
        crop: (h, w) of the crop; None keeps all.
        flip: Probability of mirroring a window left to right.
        pack: Whether short episodes share windows.
    """

    url: str
    fps: float
    stored: tuple[int, int]
    length: int = 1
    stride: int = 1
    resize: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    flip: float = 0.0
    pack: bool = False

    @property
    def span(self) -> int:
        """Stored frames from a window's first to its last, both counted."""
        return (self.length - 1) * self.stride + 1

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of pictures before the crop."""
        return self.resize or self.stored

    @property
    def delivered(self) -> tuple[int, int]:
        """(h, w) of delivered pictures."""
        return self.crop or self.size

    def check_crop(self, grid: int) -> None:
        """Make sure that the crop can be cut.

        Args:
            grid: Pixels between the places where it may be cut.

        Raises:
            OwlError: It is larger than the pictures, or they or it are no multiple of the grid.
        """
        if self.crop is None:
            return
        if not all(0 < part <= whole for part, whole in zip(self.crop, self.size, strict=True)):
            raise OwlError(
                "windows.crop",
                f"crop {list(self.crop)} does not fit in pictures of {list(self.size)}; use a smaller crop",
            )
        if any(n % grid for n in (*self.crop, *self.size)):
            raise OwlError(
                "windows.crop",
                f"crop {list(self.crop)} of {list(self.size)} cuts through the grid of the flow, stored at 1/{grid}; "
                f"use multiples of {grid}",
            )

    def draw(self, seed: int | None, grid: int) -> "View":
        """Draw the augmentation of a sample; without a seed it is the central crop, not mirrored."""
        height, width = self.delivered
        rows, columns = (self.size[0] - height) // grid, (self.size[1] - width) // grid
        if seed is None:
            return View(rows // 2 * grid, columns // 2 * grid, height, width, False)
        rng = np.random.default_rng(seed)
        mirrored = bool(rng.random() < self.flip)
        return View(int(rng.integers(rows + 1)) * grid, int(rng.integers(columns + 1)) * grid, height, width, mirrored)


@dataclass(frozen=True)
class View:
    """One draw of the augmentation: a crop of the delivered picture, in its pixels, mirrored or not."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool

    def of(self, picture: np.ndarray, downscale: int = 1) -> np.ndarray:
        """The part of a picture [H, W, ...] that is seen; ``downscale`` is that of the picture's own grid."""
        rows = slice(self.top // downscale, (self.top + self.height) // downscale)
        columns = slice(self.left // downscale, (self.left + self.width) // downscale)
        seen = picture[rows, columns]
        return seen[:, ::-1] if self.mirrored else seen


@dataclass(frozen=True)
class Clock:
    """A rate of its own, such as 44,100 samples or 50 tokens a second beside 35 frames: need not be a multiple.

    Attributes:
        rate: Samples or tokens per second.
        fps: Stored frames per second.
    """

    rate: float
    fps: float

    def least(self, frames: int) -> int:
        """Samples or tokens that every stretch of so many frames holds at least; single frames hold one more or less.

        So windows have equal lengths wherever they begin.
        """
        return math.floor(frames * self.rate / self.fps + 1e-6)

    def most(self, frames: int) -> int:
        """The most that a stretch of so many frames holds."""
        return math.ceil(frames * self.rate / self.fps - 1e-6)


@dataclass(frozen=True)
class Preview:
    """Members as pictures, for the contact sheet of ``data inspect``.

    Attributes:
        pictures: uint8[h, w, 3] of each member; None where it is missing.
        legend: How to read them.
    """

    pictures: Sequence[np.ndarray | None]
    legend: str = ""


class Modality(ABC):
    """One kind of member of a dataset: its codec, what a window delivers of it, and how it looks.

    The object belongs to one dataset and one way of taking windows of it, and refuses what cannot be done to it. To add
    a kind, write a class in a file of its own and name it in `owl.data.modalities.MODALITIES`.

    Args:
        name: What it is called in dataset.json and in samples.
        description: What dataset.json says of it.
        sampling: The windows to take.

    Attributes:
        extension: Of its members' names.
        encode: From one frame's array to the bytes of its member.
        grid: Pixels of the delivered picture from one cell of its own grid to the next; crops are cut along it.
    """

    extension: ClassVar[str]
    encode: ClassVar[Callable[..., bytes]]
    grid: int = 1

    def __init__(self, name: str, description: Mapping[str, Any], sampling: Sampling) -> None:
        self.name, self.description, self.sampling = name, description, sampling

    def frames(self, first: int, last: int) -> range:
        """The stored frames that a clip is made of, numbered within the episode.

        Args:
            first: The clip's first frame.
            last: Its last, whole strides later.

        Returns:
            Every ``stride``-th of them; a modality whose content adds up over time takes those in between as well, and
            may begin earlier.
        """
        return range(first, last + 1, self.sampling.stride)

    @abstractmethod
    def shapes(self) -> Shapes:
        """Shape and type of each tensor that a window has of it; they are the same for all windows."""

    @abstractmethod
    def decode(self, content: bytes | memoryview) -> np.ndarray:
        """Decode one member, at the delivered size but neither cropped nor mirrored.

        Raises:
            ValueError: It does not decode, or does not hold what dataset.json says.
        """

    @abstractmethod
    def assemble(self, frames: Iterable[np.ndarray], view: View, into: dict[str, np.ndarray], before: int = 0) -> None:
        """Write the decoded members of a clip into a sample's arrays (`shapes`).

        Args:
            frames: Decoded members of `frames`, in time order, taken one by one: a list of them would take longer to
                get memory for than to decode (16 ms against 9 ms for 8 frames of 360x640).
            view: The augmentation.
            into: The sample's arrays.
            before: How many of the frames come before the clip's first.

        Raises:
            ValueError: They do not fit together.
        """

    def facts(self) -> list[str]:
        """What ``data inspect`` says of it in its table."""
        return [
            f"{key} {value}"
            for key, value in self.description.items()
            if key not in ("extension", "direction", "timing") and isinstance(value, str | int | float)
        ]

    def preview(self, frames: Iterable[np.ndarray | None], size: tuple[int, int]) -> Preview | None:
        """Members decoded at their stored size as pictures of (h, w), all on one scale; None if it has no picture."""
        return None

    def levels(self, frames: Iterable[np.ndarray | None]) -> list[float] | None:
        """How much there is of it in each member, 0 to 1, for bars over an episode; None if that says nothing."""
        return None


def with_shape(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array if it has a shape.

    Raises:
        ValueError: It has another.
    """
    if array.shape != shape:
        raise ValueError(f"it has shape {list(array.shape)}, dataset.json says {list(shape)}")
    return array


def refuse_augmentation(name: str, sampling: Sampling) -> None:
    """Refuse to crop or mirror what is no picture.

    Raises:
        OwlError: The windows are to be.
    """
    if sampling.flip > 0 or sampling.crop is not None:
        raise OwlError(
            "windows.augmentation",
            f"{name} of {sampling.url} can be neither mirrored nor cropped, but flip is {sampling.flip:g} and crop "
            f"{sampling.crop}; set flip to 0 and leave crop out",
        )
