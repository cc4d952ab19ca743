"""Pinhole intrinsics (fx, fy, cx, cy) at the end of the members of cameras, in pixels of the stored rgb frame."""

import numpy as np

from owl.data import codecs
from owl.data.modalities.base import Sampling, View, finite, with_shape


def decode_camera(content: bytes | memoryview, length: int, sampling: Sampling) -> np.ndarray:
    """Decode a member float32[length] whose last four values are intrinsics, and scale these to the delivered frame.

    Raises:
        ValueError: It has another shape, or holds NaN or infinity.
    """
    camera = finite(with_shape(codecs.decode_array(content), (length,)))
    (height, width), (h, w) = sampling.stored, sampling.size
    return camera * np.array([1] * (length - 4) + [w / width, h / height] * 2, np.float32)


def crop_and_mirror(intrinsics: np.ndarray, view: View) -> None:
    """Move the principal points of float32[T, 4], in place, as cropping and mirroring move the pixels."""
    intrinsics[:, 2:] -= (view.left, view.top)
    if view.mirrored:
        intrinsics[:, 2] = view.width - intrinsics[:, 2]
