"""Depth maps."""

from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
import torch

from owl.data import codecs, screen
from owl.data.game import Frame
from owl.data.modalities.base import Preview, RecordedModality, Shapes, View, with_shape


class Depth(RecordedModality):
    """Depth as an 8-bit grey PNG per frame. Windows contain float32[T, 1, h, w] in [0, 1], the stored value / 255."""

    extension = "depth.png"
    encode = staticmethod(codecs.encode_depth)
    latent = "depth_latent"
    buffers = ("depth",)

    @classmethod
    def describe_recorded(cls, size: tuple[int, int]) -> dict[str, Any]:
        return {
            "extension": cls.extension,
            "encoding": "uint8",
            "unit": "distance in steps of about 7 map units, 0 at the eye, 255 for all beyond",
            "range": [0, 255],
            "step": screen.DEPTH_STEP,
            "offset": screen.depth_offset(size),
        }

    @classmethod
    def record(cls, frame: Frame, previous: Frame) -> np.ndarray:
        """Return uint8[H, W], 0 at the eye to 255 far away."""
        size = frame.rgb.shape[:2]
        return codecs.nearest(screen.crop(frame.state.depth_buffer, size), size)

    def shapes(self) -> Shapes:
        return {self.name: ((self.sampling.length, 1, *self.sampling.delivered), torch.float32)}

    def decode(self, content: bytes | memoryview) -> np.ndarray:
        stored = with_shape(codecs.decode_depth(content), self.sampling.stored)
        return codecs.nearest(stored, self.sampling.size)  # an average of two surfaces, or with 255, is no distance

    def assemble(self, frames: Iterable[np.ndarray], view: View, into: dict[str, np.ndarray], before: int = 0) -> None:
        for planes, frame in zip(into[self.name], frames, strict=True):
            np.divide(view.of(frame), np.float32(255), out=planes[0])

    def preview(self, frames: Iterable[np.ndarray | None], size: tuple[int, int]) -> Preview:
        pictures = [
            None
            if frame is None
            else codecs.resize(cv2.cvtColor(cv2.applyColorMap(frame, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB), size)
            for frame in frames
        ]
        return Preview(pictures, f"{self.name}: bright = high stored value")
