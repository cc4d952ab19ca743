"""Camera of each frame in any orientation, such as estimated from films."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from owl.data import codecs
from owl.data.modalities.base import Modality, Shapes, View
from owl.data.modalities.intrinsics import crop_and_mirror, decode_camera


class Camera(Modality):
    """Camera float32[16] per frame: camera to world [3, 4] by rows, then fx, fy, cx, cy in pixels of the stored rgb.

    Axes of the camera are x right, y down, z forward; the unit of positions is that of the depth. Windows contain
    "camera": float32[T, 4, 4], and "camera_intrinsics": float32[T, 4] in pixels of the delivered rgb, of every
    ``stride``-th frame: cameras are absolute. Resizing scales the intrinsics and cropping moves the principal point.
    Mirroring a picture mirrors the world and the camera along x. For upright cameras of the game see
    `owl.data.modalities.pose`.
    """

    extension = "camera.npy"
    encode = staticmethod(codecs.encode_array)

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Return its description for dataset.json."""
        return {
            "extension": cls.extension,
            "encoding": "npy float32",
            "unit": "camera to world [3, 4], then fx, fy, cx, cy in pixels of the stored rgb frame",
        }

    def shapes(self) -> Shapes:
        length = self.sampling.length
        return {self.name: ((length, 4, 4), torch.float32), f"{self.name}_intrinsics": ((length, 4), torch.float32)}

    def decode(self, content: bytes | memoryview) -> np.ndarray:
        return decode_camera(content, 16, self.sampling)

    def assemble(self, frames: Iterable[np.ndarray], view: View, into: dict[str, np.ndarray], before: int = 0) -> None:
        cameras = np.stack(list(frames))
        matrices, intrinsics = into[self.name], into[f"{self.name}_intrinsics"]
        matrices[:] = np.eye(4)
        matrices[:, :3] = cameras[:, :12].reshape(-1, 3, 4)
        intrinsics[:] = cameras[:, 12:]
        crop_and_mirror(intrinsics, view)
        if view.mirrored:
            matrices[:, 0] *= -1
            matrices[:, :, 0] *= -1
