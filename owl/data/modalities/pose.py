"""Camera pose and intrinsics of each frame."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from owl.data import codecs, screen
from owl.data.game import Frame
from owl.data.modalities.base import RecordedModality, Shapes, View
from owl.data.modalities.intrinsics import crop_and_mirror, decode_camera

NAMES = ("x", "y", "z", "angle", "pitch", "fx", "fy", "cx", "cy")
"""Values of a member, in order; units and directions are those of `owl.data.geometry.Camera`."""


class Pose(RecordedModality):
    """Pose float32[9] per frame: ``NAMES``, with the intrinsics in pixels of the stored rgb frame.

    Windows contain "pose": float32[T, 5] (x, y, z, angle, pitch) and "intrinsics": float32[T, 4] (fx, fy, cx, cy) in
    pixels of the delivered rgb, of every ``stride``-th frame: poses are absolute. Resizing scales the intrinsics and
    cropping moves the principal point. Mirroring a picture mirrors the world at the plane y = 0, which negates y and
    the angle of the camera.
    """

    extension = "pose.npy"
    encode = staticmethod(codecs.encode_array)
    variables = (
        *("CAMERA_POSITION_X", "CAMERA_POSITION_Y", "CAMERA_POSITION_Z"),
        *("CAMERA_ANGLE", "CAMERA_PITCH", "CAMERA_FOV"),
    )

    @classmethod
    def describe_recorded(cls, size: tuple[int, int]) -> dict[str, Any]:
        return {
            "extension": cls.extension,
            "encoding": "npy float32",
            "names": list(NAMES),
            "unit": "map units, degrees, pixels of the stored rgb frame",
        }

    @classmethod
    def record(cls, frame: Frame, previous: Frame) -> np.ndarray:
        variables = [frame.variables[name] for name in cls.variables]
        return screen.camera(variables, frame.state.screen_buffer.shape[:2], frame.rgb.shape[:2])

    def shapes(self) -> Shapes:
        length = self.sampling.length
        return {self.name: ((length, 5), torch.float32), "intrinsics": ((length, 4), torch.float32)}

    def decode(self, content: bytes | memoryview) -> np.ndarray:
        return decode_camera(content, len(NAMES), self.sampling)

    def assemble(self, frames: Iterable[np.ndarray], view: View, into: dict[str, np.ndarray], before: int = 0) -> None:
        poses = np.stack(list(frames))
        crop_and_mirror(poses[:, 5:], view)
        if view.mirrored:
            poses[:, [1, 3]] *= -1
        into[self.name][:], into["intrinsics"][:] = poses[:, :5], poses[:, 5:]
