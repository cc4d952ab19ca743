"""Base class of modalities: the encoding of members and the tensors of windows."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from owl.data.game import Buffer, Frame
from owl.errors import OwlError

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of tensors by name."""


@dataclass(frozen=True)
class Sampling:
    """Sampling of windows from a dataset: the frames of a window, and the size and augmentation of its pictures.

    Attributes:
        url: The dataset's folder, for messages.
        fps: Stored frames per second.
        stored: (H, W) of the stored rgb frames.
        length: Frames in a window (T).
        stride: Stored frames from one frame of a window to the next.
        resize: (h, w) of delivered pictures before the crop; None keeps the stored size.
        crop: (h, w) of the crop; None disables cropping.
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
        """Stored frames from the first to the last frame of a window, both included."""
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
        """Check that the crop is possible.

        Args:
            grid: Grid of crop positions, in pixels.

        Raises:
            OwlError: The crop is larger than the pictures, or the size of either is not a multiple of the grid.
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
        """Draw the augmentation of a sample; without a seed, return the central crop, not mirrored."""
        height, width = self.delivered
        rows, columns = (self.size[0] - height) // grid, (self.size[1] - width) // grid
        if seed is None:
            return View(rows // 2 * grid, columns // 2 * grid, height, width, False)
        rng = np.random.default_rng(seed)
        mirrored = bool(rng.random() < self.flip)
        return View(int(rng.integers(rows + 1)) * grid, int(rng.integers(columns + 1)) * grid, height, width, mirrored)


@dataclass(frozen=True)
class View:
    """A drawn augmentation: a crop in pixels of the delivered picture, mirrored or not."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool

    def of(self, picture: np.ndarray, downscale: int = 1) -> np.ndarray:
        """Apply it to a picture [H, W, ...]; ``downscale`` is the scale of the picture's grid."""
        rows = slice(self.top // downscale, (self.top + self.height) // downscale)
        columns = slice(self.left // downscale, (self.left + self.width) // downscale)
        seen = picture[rows, columns]
        return seen[:, ::-1] if self.mirrored else seen


@dataclass(frozen=True)
class Clock:
    """A rate that need not be a multiple of the frame rate, such as 44,100 samples or 50 tokens at 35 frames a second.

    Attributes:
        rate: Samples or tokens per second.
        fps: Stored frames per second.
    """

    rate: float
    fps: float

    def least(self, frames: int) -> int:
        """Return the least number of samples or tokens in any span of ``frames`` frames.

        Spans differ by one; with this length all windows are equally long.
        """
        return math.floor(frames * self.rate / self.fps + 1e-6)

    def most(self, frames: int) -> int:
        """Return the largest number of samples or tokens in any span of ``frames`` frames."""
        return math.ceil(frames * self.rate / self.fps - 1e-6)

    def whole_fps(self) -> list[float]:
        """Return the nearest frame rates at which every frame has the same number of samples or tokens, ascending."""
        each = self.rate / self.fps
        return sorted({self.rate / max(1, count) for count in (math.ceil(each - 1e-6), math.floor(each + 1e-6))})


@dataclass(frozen=True)
class Preview:
    """Members as pictures, for the contact sheet of ``data inspect``.

    Attributes:
        pictures: uint8[h, w, 3] of each member; None where it is missing.
        legend: Legend of the pictures.
    """

    pictures: Sequence[np.ndarray | None]
    legend: str = ""


class Modality(ABC):
    """Base class of modalities: the codec of members, the tensors of windows, and previews.

    An instance belongs to one dataset and one sampling; the constructor raises an error if it does not support the
    sampling. To add a modality, write a class in a new file and list it in `owl.data.modalities.MODALITIES`.

    Args:
        name: Name in dataset.json and in samples.
        description: Its entry in dataset.json.
        sampling: The sampling of windows.

    Attributes:
        extension: Extension of the members' names.
        encode: Encodes the array of a frame to the bytes of its member.
        latent: Default name of the latents of its encoder.
        grid: Cell size of its grid in pixels of the delivered picture; crops are aligned with it.
    """

    extension: ClassVar[str]
    encode: ClassVar[Callable[..., bytes]]
    latent: ClassVar[str] = "latent"
    grid: int = 1

    def __init__(self, name: str, description: Mapping[str, Any], sampling: Sampling) -> None:
        self.name, self.description, self.sampling = name, description, sampling

    @classmethod
    def in_windows(cls, description: dict[str, Any], stride: int) -> dict[str, Any]:
        """Return a description whose ``shape``, if it has one, is that of a frame in windows.

        Args:
            description: Its entry in dataset.json.
            stride: Stored frames from one frame of a window to the next.
        """
        return description

    def frames(self, first: int, last: int) -> range:
        """Return the indices within the episode of the stored frames of a clip.

        Args:
            first: The clip's first frame.
            last: The clip's last frame, a multiple of the stride later.

        Returns:
            Every ``stride``-th frame; a modality that accumulates over time also includes the skipped frames, and
            may start earlier.
        """
        return range(first, last + 1, self.sampling.stride)

    @abstractmethod
    def shapes(self) -> Shapes:
        """Return the shape and dtype of each of its tensors in a window; they are the same for all windows."""

    @abstractmethod
    def decode(self, content: bytes | memoryview) -> np.ndarray:
        """Decode one member at the delivered size, without cropping and mirroring.

        Raises:
            ValueError: It cannot be decoded, or does not match its description in dataset.json.
        """

    @abstractmethod
    def assemble(self, frames: Iterable[np.ndarray], view: View, into: dict[str, np.ndarray], before: int = 0) -> None:
        """Write the decoded members of a clip into a sample's arrays (`shapes`).

        Args:
            frames: Decoded members of `frames`, in time order, as an iterator: allocating memory for a list of them
                takes longer than decoding (16 ms against 9 ms for 8 frames of 360x640).
            view: The augmentation.
            into: The sample's arrays.
            before: Number of frames before the first frame of the clip.

        Raises:
            ValueError: The members are inconsistent.
        """

    def facts(self) -> list[str]:
        """Return its properties for the table of ``data inspect``."""
        return [
            f"{key} {value}"
            for key, value in self.description.items()
            if key not in ("extension", "direction", "timing") and isinstance(value, str | int | float)
        ]

    def preview(self, frames: Iterable[np.ndarray | None], size: tuple[int, int]) -> Preview | None:
        """Draw members, decoded at their stored size, as pictures of (h, w) on one scale; None if not supported."""
        return None

    def levels(self, frames: Iterable[np.ndarray | None]) -> list[float] | None:
        """Return the level of each member, 0 to 1, for a bar chart over an episode; None if not supported."""
        return None


class RecordedModality(Modality):
    """Base class of modalities that ``data record`` writes from the game.

    Attributes:
        buffers: Buffers of ``Frame.state`` that `record` reads as well as the screen.
        variables: Keys of ``Frame.variables`` that it reads, names of ``vizdoom.GameVariable``.
    """

    buffers: ClassVar[tuple[Buffer, ...]] = ()
    variables: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def describe_recorded(cls, size: tuple[int, int]) -> dict[str, Any]:
        """Return its description for dataset.json if it is recorded with pictures of (H, W)."""

    @classmethod
    @abstractmethod
    def record(cls, frame: Frame, previous: Frame) -> Any:
        """Return what `encode` gets for a frame of the game.

        Args:
            frame: The frame.
            previous: The frame before it, or itself if it is a cut.
        """


def with_shape(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array after checking its shape.

    Raises:
        ValueError: The shape differs.
    """
    if array.shape != shape:
        raise ValueError(f"it has shape {list(array.shape)}, dataset.json says {list(shape)}")
    return array


def finite(array: np.ndarray) -> np.ndarray:
    """Return an array after checking its values.

    Raises:
        ValueError: One is NaN or infinite.
    """
    if not np.isfinite(array).all():
        raise ValueError("it holds NaN or infinity")
    return array


def refuse_augmentation(name: str, sampling: Sampling) -> None:
    """Check that cropping and mirroring are disabled, for a modality that is not a picture.

    Raises:
        OwlError: Cropping or mirroring is enabled.
    """
    if sampling.flip > 0 or sampling.crop is not None:
        raise OwlError(
            "windows.augmentation",
            f"{name} of {sampling.url} can be neither mirrored nor cropped, but flip is {sampling.flip:g} and crop "
            f"{sampling.crop}; set flip to 0 and leave crop out",
        )
