"""Segmentation labels: the object of each pixel and its name."""

import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from owl.data import codecs, screen
from owl.data.game import Frame
from owl.data.modalities.base import Preview, RecordedModality, Sampling, Shapes, View, with_shape
from owl.errors import OwlError

KEY = "names"  # of the PNG's text


class Labels(RecordedModality):
    """Labels as a 16-bit grey PNG per frame: the object number of each pixel, constant over an episode.

    The names of the numbers are a JSON object in the PNG's text chunk "names". ``names`` in the description lists the
    names of the whole dataset.

    Windows contain "labels": int32[T, h, w], the object numbers, and "classes": int32[T, h, w], the index of the
    object's name in ``names``. Smaller sizes take the middle pixel of each area.

    Raises:
        OwlError: The description has no ``names``: the recording was interrupted before they were written.
    """

    extension = "labels.png"
    buffers = ("labels",)

    def __init__(self, name: str, description: Mapping[str, Any], sampling: Sampling) -> None:
        super().__init__(name, description, sampling)
        if "names" not in description:
            raise OwlError(
                "dataset.unfinished",
                f"dataset.json of {sampling.url} does not list the names of its {name}, which are added last; run the "
                "command that made it again, which adds them",
            )
        self._classes = {name: place for place, name in enumerate(description["names"])}

    @classmethod
    def describe_recorded(cls, size: tuple[int, int]) -> dict[str, Any]:
        """Return its description for dataset.json without ``names``, which are added when all frames are written."""
        return {"extension": cls.extension, "encoding": "uint16, names in the text chunk"}

    @classmethod
    def record(cls, frame: Frame, previous: Frame) -> tuple[np.ndarray, dict[int, str]]:
        return screen.read_labels(frame.state, frame.rgb.shape[:2])

    @staticmethod
    def encode(labels: tuple[np.ndarray, Mapping[int, str]]) -> bytes:
        """Compress uint16[H, W] and the name of each number in it.

        Raises:
            ValueError: A number has no name.
        """
        objects, names = labels
        present = {int(number): names.get(int(number)) for number in np.unique(objects)}
        if None in present.values():
            raise ValueError(f"the labels {[number for number, name in present.items() if name is None]} have no name")
        text, buffer = PngInfo(), io.BytesIO()
        text.add_text(KEY, json.dumps(present))
        Image.fromarray(objects).save(buffer, "PNG", compress_level=1, pnginfo=text)
        return buffer.getvalue()

    @staticmethod
    def read_names(content: bytes | memoryview) -> dict[int, str]:
        """Read the name of each number from the output of `encode`, without decoding pixels.

        Raises:
            ValueError: The bytes are not a PNG with names.
        """
        return _open(content)[1]

    @staticmethod
    def read(content: bytes | memoryview) -> tuple[np.ndarray, dict[int, str]]:
        """Decompress the output of `encode`: uint16[H, W] and the name of each number in it.

        Raises:
            ValueError: The bytes are not a PNG with names.
        """
        image, names = _open(content)
        try:
            objects = np.asarray(image)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"the PNG is damaged ({error!r})") from error
        if objects.dtype != np.uint16 or objects.ndim != 2:
            raise ValueError(f"labels PNG holds {objects.dtype}{list(objects.shape)}, expected uint16[H, W]")
        return objects, names

    def shapes(self) -> Shapes:
        shape = (self.sampling.length, *self.sampling.delivered)
        return {self.name: (shape, torch.int32), "classes": (shape, torch.int32)}

    def decode(self, content: bytes | memoryview) -> np.ndarray:
        """Decode to int32[h, w, 2]: objects and classes."""
        objects, names = self.read(content)
        objects = codecs.nearest(with_shape(objects, self.sampling.stored), self.sampling.size)
        numbers, places = np.unique(objects, return_inverse=True)
        try:
            classes = np.array([self._classes[names[int(number)]] for number in numbers], np.int32)
        except KeyError as error:
            raise ValueError(f"it holds {error}, which has no name in it or in dataset.json") from error
        return np.stack([objects.astype(np.int32), classes[places.reshape(objects.shape)]], -1)

    def assemble(self, frames: Iterable[np.ndarray], view: View, into: dict[str, np.ndarray], before: int = 0) -> None:
        for objects, classes, frame in zip(into[self.name], into["classes"], frames, strict=True):
            seen = view.of(frame)
            objects[:], classes[:] = seen[..., 0], seen[..., 1]

    def facts(self) -> list[str]:
        return [*super().facts(), f"{len(self._classes)} names"]

    def preview(self, frames: Iterable[np.ndarray | None], size: tuple[int, int]) -> Preview:
        """Draw each name in a different colour."""
        pictures = [None if frame is None else codecs.nearest(_colour(frame[..., 1]), size) for frame in frames]
        return Preview(pictures, f"{self.name}: a colour for each name")


def _open(content: bytes | memoryview) -> tuple[Image.Image, dict[int, str]]:
    try:
        image = Image.open(io.BytesIO(content), formats=["PNG"])  # up to the pixels
        return image, {int(number): str(name) for number, name in json.loads(image.info[KEY]).items()}
    except (OSError, SyntaxError, KeyError, AttributeError) as error:
        raise ValueError(f"the bytes are not a PNG with names ({error!r})") from error


def _colour(classes: np.ndarray) -> np.ndarray:
    """Return uint8[h, w, 3] with hues that are far apart for neighbouring numbers."""
    hue = (classes * 0.618034 % 1 * 180).astype(np.uint8)
    hsv = np.stack([hue, np.full_like(hue, 150), np.full_like(hue, 220)], -1)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
