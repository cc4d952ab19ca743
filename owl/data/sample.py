"""From the members of a window to the tensors of a sample: decoding, sizes, augmentation of all modalities alike."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from owl.data import codecs
from owl.data.shards import DatasetInfo
from owl.errors import OwlError

MODALITIES = ("rgb", "depth", "flow", "audio", "controls")


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
class Mirror:
    """What left-right mirroring does to controls.

    Attributes:
        buttons: int64[B], which button's state each button takes.
        axes: float32[A], the factor 1 or -1 of each axis.
    """

    buttons: np.ndarray
    axes: np.ndarray

    @classmethod
    def from_description(cls, description: dict, url: str) -> "Mirror":
        """Read the mirror table of dataset.json's controls.

        Raises:
            OwlError: There is no table, or it names buttons or axes that the dataset does not have.
        """
        if "mirror" not in description:
            raise OwlError(
                f"the controls of {url} have no mirror table, flip needs one; add it to dataset.json or set flip to 0"
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
                f"the mirror table of {url} does not fit its buttons and axes ({error}); correct dataset.json"
            ) from error
        return cls(order, factors)


class SampleDecoder:
    """Decodes members and assembles samples.

    Args:
        info: The dataset's description.
        url: The dataset's folder, for messages.
        modalities: What will be decoded.
        span: Stored frames from a window's first to its last, both counted.
        stride: Stored frames from one frame of a window to the next.
        size: (h, w) of delivered pictures before the crop; None keeps the stored size.
        crop: (h, w) of the crop; None keeps all.
        flip: Probability of mirroring.

    Raises:
        OwlError: The crop does not fit, or controls cannot be mirrored.
    """

    def __init__(
        self,
        info: DatasetInfo,
        url: str,
        modalities: Sequence[str],
        span: int,
        stride: int,
        size: Sequence[int] | None,
        crop: Sequence[int] | None,
        flip: float,
    ) -> None:
        self._info, self._stride, self._flip = info, stride, flip
        self._length = (span - 1) // stride + 1
        self._size = (int(size[0]), int(size[1])) if size is not None else info.size
        self._downscale = int(info.modalities["flow"]["downscale"]) if "flow" in modalities else 1
        self._crop = self._check_crop(crop)
        if "audio" in modalities:
            # frames hold one sample more or less where the rate is no multiple of fps; this many are always there
            self._samples = math.floor(span * info.modalities["audio"]["sample_rate"] / info.fps + 1e-6)
        if "controls" in modalities:
            controls = info.modalities["controls"]
            self._buttons, self._axes = len(controls["buttons"]), len(controls["axes"])
            self._mirror = Mirror.from_description(controls, url) if flip > 0 else None

    def _check_crop(self, crop: Sequence[int] | None) -> tuple[int, int]:
        if crop is None:
            return self._size
        height, width = int(crop[0]), int(crop[1])
        if not (0 < height <= self._size[0] and 0 < width <= self._size[1]):
            raise OwlError(f"crop {[height, width]} does not fit in pictures of {list(self._size)}; use a smaller crop")
        if any(n % self._downscale for n in (height, width, *self._size)):
            raise OwlError(
                f"crop {[height, width]} of {list(self._size)} cuts through the grid of the flow, stored at "
                f"1/{self._downscale}; use multiples of {self._downscale}"
            )
        return height, width

    def draw(self, seed: int | None) -> View:
        """Draw the augmentation of a sample; without a seed it is the central crop, not mirrored."""
        (height, width), step = self._crop, self._downscale
        rows, columns = (self._size[0] - height) // step, (self._size[1] - width) // step
        if seed is None:
            return View(rows // 2 * step, columns // 2 * step, height, width, False)
        rng = np.random.default_rng(seed)
        mirrored = bool(rng.random() < self._flip)
        return View(int(rng.integers(rows + 1)) * step, int(rng.integers(columns + 1)) * step, height, width, mirrored)

    def decode(self, modality: str, content: bytes | memoryview) -> np.ndarray:
        """Decode one member at the delivered size.

        Raises:
            ValueError: It does not decode, or does not hold what dataset.json says.
        """
        if modality == "rgb":
            reduced = None if self._size == self._info.size else self._size
            return _checked(codecs.decode_rgb(content, reduced), (*self._size, 3))
        if modality == "depth":
            return codecs.resize(codecs.decode_depth(content), self._size)
        if modality == "flow":
            return self._decode_flow(content)
        array = codecs.decode_array(content)
        if modality == "audio":
            return _checked(array, (len(array), self._info.modalities["audio"]["channels"]))
        return _checked(array, (self._buttons + self._axes,))

    def _decode_flow(self, content: bytes | memoryview) -> np.ndarray:
        flow = codecs.decode_flow(content)
        if self._size == self._info.size:
            return flow
        flow = codecs.resize(flow, (self._size[0] // self._downscale, self._size[1] // self._downscale))
        return flow * np.array([self._size[1] / self._info.size[1], self._size[0] / self._info.size[0]], np.float32)

    def assemble(self, modality: str, frames: Iterable[np.ndarray], view: View) -> dict[str, torch.Tensor]:
        """Join the decoded frames of a window; shapes as in :meth:`WindowDataset.__getitem__`.

        Args:
            modality: What the frames are.
            frames: Decoded members, in time order; given one by one, pictures are never all in memory twice, which
                makes the difference between 9 and 16 ms for 8 frames of 360x640.
            view: The augmentation.

        Raises:
            ValueError: Audio is too short, or frames differ in shape.
        """
        height, width, length = view.height, view.width, self._length
        if modality == "rgb":
            rgb = np.empty((length, 3, height, width), np.uint8)
            for planes, frame in zip(rgb, frames, strict=True):
                cv2.split(
                    np.ascontiguousarray(view.of(frame)), list(planes)
                )  # eight times as fast as a transposed copy
            return {"rgb": torch.from_numpy(rgb)}
        if modality == "depth":
            depth = np.empty((length, 1, height, width), np.float32)
            for plane, frame in zip(depth, frames, strict=True):
                np.divide(view.of(frame), np.float32(255), out=plane[0])
            return {"depth": torch.from_numpy(depth)}
        if modality == "flow":
            flow = np.stack([view.of(frame, self._downscale) for frame in frames]).transpose(0, 3, 1, 2)
            flow = np.ascontiguousarray(flow)
            if view.mirrored:
                flow[:, 0] *= -1
            return {"flow": torch.from_numpy(flow)}
        if modality == "audio":
            return {"audio": self._assemble_audio(frames, view)}
        return self._assemble_controls(np.stack(list(frames)).astype(np.float32), view)

    def _assemble_audio(self, frames: Iterable[np.ndarray], view: View) -> torch.Tensor:
        audio = np.concatenate(list(frames))[: self._samples]
        if len(audio) < self._samples:
            raise ValueError(f"a window holds {len(audio)} audio samples, {self._samples} were expected")
        audio = audio.T.astype(np.float32) / 2**15
        if view.mirrored and len(audio) == 2:
            audio = audio[::-1].copy()  # the left ear hears what the right one did
        return torch.from_numpy(np.ascontiguousarray(audio))

    def _assemble_controls(self, controls: np.ndarray, view: View) -> dict[str, torch.Tensor]:
        buttons, axes = controls[:, : self._buttons], controls[:, self._buttons :]
        if view.mirrored and self._mirror is not None:
            buttons, axes = buttons[:, self._mirror.buttons], axes * self._mirror.axes
        if self._stride > 1:
            # frame t's controls brought frame t about: those of skipped frames lead up to the window's next frame
            starts = np.concatenate([[0], np.arange(1, len(controls), self._stride)])
            buttons = np.maximum.reduceat(buttons, starts, axis=0)
            axes = np.add.reduceat(axes, starts, axis=0)
        return {
            "buttons": torch.from_numpy(np.ascontiguousarray(buttons)),
            "axes": torch.from_numpy(np.ascontiguousarray(axes)),
        }


def _checked(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.shape != shape:
        raise ValueError(f"it has shape {list(array.shape)}, dataset.json says {list(shape)}")
    return array
