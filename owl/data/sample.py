"""From the members of a window to the tensors of a sample: decoding, sizes, augmentation of all modalities alike."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from owl.data import codecs
from owl.data.flow import compose_flow
from owl.data.shards import DatasetInfo
from owl.errors import OwlError

LATENTS = ("latent", "audio_latent", "motion_latent", "conditioning_latent")
MODALITIES = ("rgb", "depth", "flow", "audio", "controls", *LATENTS)


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


class SampleDecoder:
    """Decodes members and assembles samples.

    Args:
        info: The dataset's description.
        url: The dataset's folder, for messages.
        modalities: What will be decoded.
        span: Stored frames from a window's first to its last, both counted.
        stride: Stored frames from one frame of a window to the next.
        size: (h, w) of delivered pictures before the crop; None keeps the stored size. Latents keep theirs.
        crop: (h, w) of the crop; None keeps all.
        flip: Probability of mirroring.

    Raises:
        OwlError: The crop does not fit, controls cannot be mirrored, latents were to be mirrored or cropped, or latents
            of motion were to skip frames.
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
        self._modalities, self._length = tuple(modalities), (span - 1) // stride + 1
        self._size = (int(size[0]), int(size[1])) if size is not None else info.size
        self._downscale = int(info.modalities["flow"]["downscale"]) if "flow" in modalities else 1
        self._crop = self._check_crop(crop)
        for modality in LATENTS:
            if modality in modalities and (flip > 0 or crop is not None):
                raise OwlError(
                    "windows.augmentation",
                    f"{modality} of {url} can be neither mirrored nor cropped, but flip is {flip:g} and crop {crop}; "
                    "set flip to 0 and leave crop out",
                )
        if "motion_latent" in modalities and stride > 1:
            raise OwlError(
                "windows.stride",
                f"motion_latent of {url} is the motion from one stored frame to the next, but stride is {stride}; "
                "set stride to 1, or use flow, which is added up",
            )
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
            raise OwlError(
                "windows.crop",
                f"crop {[height, width]} does not fit in pictures of {list(self._size)}; use a smaller crop",
            )
        if any(n % self._downscale for n in (height, width, *self._size)):
            raise OwlError(
                "windows.crop",
                f"crop {[height, width]} of {list(self._size)} cuts through the grid of the flow, stored at "
                f"1/{self._downscale}; use multiples of {self._downscale}",
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

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each tensor of a sample; they are the same for all samples."""
        length, (height, width), step = self._length, self._crop, self._downscale
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for modality in self._modalities:
            if modality == "rgb":
                shapes["rgb"] = ((length, 3, height, width), torch.uint8)
            elif modality == "depth":
                shapes["depth"] = ((length, 1, height, width), torch.float32)
            elif modality == "flow":
                shapes["flow"] = ((length, 2, height // step, width // step), torch.float32)
            elif modality == "audio":
                shapes["audio"] = ((self._info.modalities["audio"]["channels"], self._samples), torch.float32)
            elif modality == "controls":
                shapes["buttons"] = ((length, self._buttons), torch.float32)
                shapes["axes"] = ((length, self._axes), torch.float32)
            else:
                shapes[modality] = ((length, *self._info.modalities[modality]["shape"]), torch.float32)
        return shapes

    def decode(self, modality: str, content: bytes | memoryview) -> np.ndarray:
        """Decode one member at the delivered size.

        Raises:
            ValueError: It does not decode, or does not hold what dataset.json says.
        """
        height, width = self._info.size
        reduced = None if self._size == self._info.size else self._size
        if modality == "rgb":
            return _checked(codecs.decode_rgb(content, reduced), (*self._size, 3))
        if modality == "depth":
            return codecs.resize(_checked(codecs.decode_depth(content), (height, width)), self._size)
        if modality == "flow":
            step = self._downscale
            flow = _checked(codecs.decode_flow(content), (height // step, width // step, 2))
            if reduced is None:
                return flow
            scale = np.array([reduced[1] / width, reduced[0] / height], np.float32)
            return codecs.resize(flow, (reduced[0] // step, reduced[1] // step)) * scale
        array = codecs.decode_array(content)
        if modality in LATENTS:
            if not np.isfinite(_checked(array, tuple(self._info.modalities[modality]["shape"]))).all():
                raise ValueError("it holds NaN or infinity")
            return array
        if modality == "audio":
            return _checked(array, (len(array), self._info.modalities["audio"]["channels"]))
        return _checked(array, (self._buttons + self._axes,))

    def assemble(
        self, modality: str, frames: Iterable[np.ndarray], view: View, into: dict[str, np.ndarray], before: int = 0
    ) -> None:
        """Write the decoded frames of a window into a sample's arrays (`shapes`).

        Args:
            modality: What the frames are.
            frames: Decoded members, in time order, taken one by one: a list of them would take longer to get memory
                for than to decode (16 ms against 9 ms for 8 frames of 360x640).
            view: The augmentation.
            into: The sample's arrays.
            before: How many of the frames come before the window's first, of flow.

        Raises:
            ValueError: There is too little audio.
        """
        if modality == "rgb":
            for planes, frame in zip(into["rgb"], frames, strict=True):
                cv2.split(
                    np.ascontiguousarray(view.of(frame)), list(planes)
                )  # eight times as fast as a transposed copy
        elif modality == "depth":
            for planes, frame in zip(into["depth"], frames, strict=True):
                np.divide(view.of(frame), np.float32(255), out=planes[0])
        elif modality == "flow":
            for planes, frame in zip(into["flow"], self._add_up(frames, before), strict=True):
                seen = view.of(frame, self._downscale)
                np.multiply(seen[..., 0], -1 if view.mirrored else 1, out=planes[0])
                planes[1] = seen[..., 1]
        elif modality == "audio":
            self._assemble_audio(np.concatenate(list(frames)), view, into["audio"])
        elif modality in LATENTS:
            for latent, frame in zip(into[modality], frames, strict=True):
                latent[:] = frame
        else:
            controls = np.stack(list(frames)).astype(np.float32)
            self._assemble_controls(controls[:, : self._buttons], controls[:, self._buttons :], view, into)

    def _add_up(self, flows: Iterable[np.ndarray], before: int) -> Iterator[np.ndarray]:
        """Yield the flow of each frame of a window back to the one that its stride puts before it."""
        total: np.ndarray | None = None
        for frame, flow in enumerate(flows, -before):
            total = flow if total is None else compose_flow(flow, total, self._size)
            if frame % self._stride == 0:
                yield total
                total = None

    def _assemble_audio(self, audio: np.ndarray, view: View, into: np.ndarray) -> None:
        if len(audio) < self._samples:
            raise ValueError(f"a window holds {len(audio)} audio samples, {self._samples} were expected")
        # the left ear of a mirrored window hears what the right one did
        swapped = view.mirrored and audio.shape[1] == 2
        channels = audio[: self._samples, ::-1] if swapped else audio[: self._samples]
        np.divide(channels.T, np.float32(2**15), out=into)

    def _assemble_controls(
        self, buttons: np.ndarray, axes: np.ndarray, view: View, into: dict[str, np.ndarray]
    ) -> None:
        if view.mirrored and self._mirror is not None:
            buttons, axes = buttons[:, self._mirror.buttons], axes * self._mirror.axes
        if self._stride > 1:
            # frame t's controls brought frame t about: those of skipped frames lead up to the window's next frame
            starts = np.concatenate([[0], np.arange(1, len(buttons), self._stride)])
            buttons = np.maximum.reduceat(buttons, starts, axis=0)
            axes = np.add.reduceat(axes, starts, axis=0)
        into["buttons"][:] = buttons
        into["axes"][:] = axes


def _checked(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.shape != shape:
        raise ValueError(f"it has shape {list(array.shape)}, dataset.json says {list(shape)}")
    return array
