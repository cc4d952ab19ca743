"""Depth maps."""

from collections.abc import Iterable

import cv2
import numpy as np
import torch

from owl.data import codecs
from owl.data.modalities.base import Modality, Preview, Shapes, View, with_shape


class Depth(Modality):
    """Depth as an 8-bit grey PNG per frame. Windows contain float32[T, 1, h, w] in [0, 1], the stored value / 255."""

    extension = "depth.png"
    encode = staticmethod(codecs.encode_depth)
    latent = "depth_latent"

    def shapes(self) -> Shapes:
        return {self.name: ((self.sampling.length, 1, *self.sampling.delivered), torch.float32)}

    def decode(self, content: bytes | memoryview) -> np.ndarray:
        return codecs.resize(with_shape(codecs.decode_depth(content), self.sampling.stored), self.sampling.size)

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
