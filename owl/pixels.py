"""Conversion between stored pixels and network inputs."""

from torch import Tensor


def to_float(pixels: Tensor) -> Tensor:
    """Convert uint8 in [0, 255] to float32 in [-1, 1], the input range of all networks, in any shape."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Convert float, clipped to [-1, 1], to uint8 in [0, 255], in any shape; the inverse of `to_float`."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
