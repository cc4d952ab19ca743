"""Optical flow."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from owl.data import codecs
from owl.data.flow import compose_flow, estimate_flow, flow_downscale
from owl.data.game import Frame
from owl.data.modalities.base import Preview, RecordedModality, Sampling, Shapes, View, with_shape
from owl.viz.modalities import colour_flow

SCALE = 0.1
"""Speed at full saturation as a picture (`owl.pixels.flow_to_picture`), as a part of the diagonal."""


class Flow(RecordedModality):
    """Optical flow as a 16-bit PNG per frame in KITTI's format, at 1 / ``downscale`` of the resolution, in rgb pixels.

    Windows contain float32[T, 2, h, w], (dx, dy) back to the previous frame of the window, in pixels of the delivered
    rgb. If a stride skips frames, their flow is composed; the flow of the first frame also leads back by ``stride``
    frames, or to the first frame of the episode. Mirroring changes the sign of dx.
    """

    extension = "flow.png"
    encode = staticmethod(codecs.encode_flow)
    latent = "motion_latent"

    def __init__(self, name: str, description: Mapping[str, Any], sampling: Sampling) -> None:
        super().__init__(name, description, sampling)
        self.grid = int(description["downscale"])

    @classmethod
    def describe(cls, size: tuple[int, int]) -> dict[str, Any]:
        """Return the description for dataset.json of flow between frames of (H, W), on the grid of `flow_downscale`."""
        return {
            "extension": cls.extension,
            "encoding": "kitti-uint16",
            "downscale": flow_downscale(size),
            "unit": "pixels of the stored rgb frame",
            "scale": SCALE,
            "direction": "frame[t-1](x + flow) ~ frame[t](x); zero at an episode's first frame",
        }

    @classmethod
    def describe_recorded(cls, size: tuple[int, int]) -> dict[str, Any]:
        return cls.describe(size)

    @classmethod
    def record(cls, frame: Frame, previous: Frame) -> np.ndarray:
        return estimate_flow(previous.rgb, frame.rgb, flow_downscale(frame.rgb.shape[:2]))

    def frames(self, first: int, last: int) -> range:
        # the motion to the first frame starts one stride before it
        return range(first - min(self.sampling.stride - 1, first), last + 1)

    def shapes(self) -> Shapes:
        height, width = self.sampling.delivered
        shape = (self.sampling.length, 2, height // self.grid, width // self.grid)
        return {self.name: (shape, torch.float32)}

    def decode(self, content: bytes | memoryview) -> np.ndarray:
        (height, width), size = self.sampling.stored, self.sampling.size
        flow = with_shape(codecs.decode_flow(content), (height // self.grid, width // self.grid, 2))
        if size == self.sampling.stored:
            return flow
        scale = np.array([size[1] / width, size[0] / height], np.float32)
        return codecs.resize(flow, (size[0] // self.grid, size[1] // self.grid)) * scale

    def assemble(self, frames: Iterable[np.ndarray], view: View, into: dict[str, np.ndarray], before: int = 0) -> None:
        for planes, frame in zip(into[self.name], self._add_up(frames, before), strict=True):
            seen = view.of(frame, self.grid)
            np.multiply(seen[..., 0], -1 if view.mirrored else 1, out=planes[0])
            planes[1] = seen[..., 1]

    def _add_up(self, flows: Iterable[np.ndarray], before: int) -> Iterator[np.ndarray]:
        """Yield the flow of each frame of a window back to the frame one stride before it."""
        total: np.ndarray | None = None
        for frame, flow in enumerate(flows, -before):
            total = flow if total is None else compose_flow(flow, total, self.sampling.size)
            if frame % self.sampling.stride == 0:
                yield total
                total = None

    def preview(self, frames: Iterable[np.ndarray | None], size: tuple[int, int]) -> Preview:
        flows = list(frames)
        speeds = [np.linalg.norm(flow, axis=-1).ravel() for flow in flows if flow is not None]
        speed = max(1.0, float(np.percentile(np.concatenate(speeds), 98))) if speeds else 1.0
        pictures = [None if flow is None else codecs.resize(colour_flow(flow, speed), size) for flow in flows]
        return Preview(pictures, f"{self.name}: hue = direction, full brightness = {speed:.0f} px")
