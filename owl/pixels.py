"""Pixels as files hold them, and as networks see them."""

from torch import Tensor


def to_float(pixels: Tensor) -> Tensor:
    """uint8 of any shape in [0, 255] -> float32 of the same shape in [-1, 1], which every network takes."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float of any shape, clipped to [-1, 1] -> uint8 of the same shape in [0, 255]; undoes `to_float`."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
