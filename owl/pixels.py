"""Conversion between stored pixels, depth and optical flow, and network inputs: pictures in [-1, 1]."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from owl.errors import OwlError

UNKNOWN = -1.5
"""Value of a picture of depth or flow where nothing was measured; measured values are in [-1, 1]."""

# One row for each colour channel. Columns are orthogonal, so that two thirds of the transpose is the inverse.
WHEEL = [[math.cos(2 * math.pi * channel / 3), math.sin(2 * math.pi * channel / 3)] for channel in range(3)]


def to_float(pixels: Tensor) -> Tensor:
    """Convert uint8 in [0, 255] to float32 in [-1, 1], the input range of all networks, in any shape."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Convert float, clipped to [-1, 1], to uint8 in [0, 255], in any shape; the inverse of `to_float`."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()


@dataclass(frozen=True)
class DepthScale:
    """Distances of the levels of a dataset's depth.

    Level n, from 1 to 255, stands for (n + offset) * step, which is the distance along the viewing direction or, with
    ``inverse``, its reciprocal. Level 0 is no measurement; in the game it is the weapon or hand of the player, or what
    is nearer than one level.

    Attributes:
        step: Step from one level to the next, above 0.
        offset: Levels added before the multiplication, above -1.
        inverse: Whether levels are inverse distances.
    """

    step: float
    offset: float
    inverse: bool = False

    @classmethod
    def of(cls, description: Mapping[str, Any], url: str) -> "DepthScale":
        """Read the scale from the description of depth in dataset.json.

        Raises:
            OwlError: There is none, or it is impossible.
        """
        step, offset = (description.get(name) for name in ("step", "offset"))
        if not (isinstance(step, int | float) and isinstance(offset, int | float) and step > 0 and offset > -1):
            raise OwlError(
                "dataset.scale",
                f"depth of {url} has step {step} and offset {offset}, expected a step above 0 and an offset above -1, "
                "which convert its levels to distances; add them to dataset.json",
            )
        return cls(float(step), float(offset), bool(description.get("inverse", False)))

    @property
    def near(self) -> float:
        """Shortest distance."""
        return self.distance_of_level(255 if self.inverse else 1)

    @property
    def far(self) -> float:
        """Longest distance."""
        return self.distance_of_level(1 if self.inverse else 255)

    def distance_of_level(self, level: float) -> float:
        """Return the distance of a level."""
        value = (level + self.offset) * self.step
        return 1 / value if self.inverse else value

    def distance(self, depth: Tensor) -> Tensor:
        """Convert depth as in windows, float in [0, 1] in any shape, to distances; those of level 0 are meaningless."""
        value = (255 * depth + self.offset) * self.step
        return 1 / value if self.inverse else value

    def to_picture(self, depth: Tensor) -> Tensor:
        """Convert depth to the logarithm of distance, from 1 (near) to -1 (far).

        Equal steps are equal ratios of distance. Inverse depth, as networks of single frames predict it, would spend
        most of the range on the nearest surfaces of the game.

        Args:
            depth: float[...] in [0, 1], as in windows.

        Returns:
            float[...] in [-1, 1], and ``UNKNOWN`` where the depth is 0 or NaN.
        """
        return self.draw(self.measured(depth))

    def measured(self, depth: Tensor) -> Tensor:
        """Convert depth as in windows to distances, infinite where the depth is 0 or NaN."""
        known = depth > 0.5 / 255
        return torch.where(known, self.distance(torch.where(known, depth, 1.0)), torch.inf)

    def draw(self, distance: Tensor) -> Tensor:
        """Convert distances to the picture of `to_picture`, ``UNKNOWN`` where they are not finite."""
        known = distance.isfinite()
        near = torch.where(known, distance, self.near).clamp(self.near, self.far) / self.near
        return torch.where(known, 1 - 2 * torch.log(near) / math.log(self.far / self.near), UNKNOWN)

    def from_picture(self, picture: Tensor) -> Tensor:
        """Convert the result of `to_picture`, clipped to [-1, 1], to distances."""
        return self.near * torch.exp((1 - picture.clamp(-1, 1)) / 2 * math.log(self.far / self.near))


def flow_scale(description: Mapping[str, Any], url: str) -> float:
    """Read the scale of optical flow from its description in dataset.json: full saturation, as a part of the diagonal.

    Raises:
        OwlError: There is none, or it is not above 0.
    """
    scale = description.get("scale")
    if not (isinstance(scale, int | float) and scale > 0):
        raise OwlError(
            "dataset.scale",
            f"flow of {url} has scale {scale}, expected a number above 0, the speed at full saturation as a part of "
            "the picture's diagonal; add it to dataset.json, such as 0.1",
        )
    return float(scale)


def flow_to_picture(flow: Tensor, scale: float, size: tuple[int, int]) -> Tensor:
    """Draw optical flow as colours, one for each direction, after VideoJAM (Chefer et al. 2025).

    Hue is the direction, saturation the magnitude m = min(1, |v| / (scale sqrt(H^2 + W^2))). The wheel is
    (cos a, cos(a - 120°), cos(a - 240°)) m: at rest grey, and linear, so that the mean of colours is the colour of the
    mean, and a small error of a colour is a small error of the flow. The hue of HSV would jump at 360°.

    Args:
        flow: float[B, 2, h, w], (dx, dy) in pixels of the picture.
        scale: The dataset's scale.
        size: (H, W) of the picture; flow on a coarser grid is interpolated.

    Returns:
        float[B, 3, H, W] in [-1, 1], and ``UNKNOWN`` where the flow is not finite, in the dtype of ``flow``.
    """
    dtype = flow.dtype
    with torch.autocast(flow.device.type, enabled=False):  # bfloat16 has eight bits
        flow = flow.float()
        if flow.shape[-2:] != size:
            flow = F.interpolate(flow, size, mode="bilinear", align_corners=False)
        known = flow.isfinite().all(1, keepdim=True)
        fraction = torch.where(known, flow, 0.0) / (scale * math.hypot(*size))
        fraction = fraction / fraction.norm(dim=1, keepdim=True).clamp(min=1)
        picture = torch.einsum("kc,bchw->bkhw", _wheel(flow.device), fraction)
        return torch.where(known, picture, UNKNOWN).to(dtype)


def picture_to_flow(picture: Tensor, scale: float) -> Tensor:
    """Invert `flow_to_picture`, float[B, 3, H, W] -> float32[B, 2, H, W]: the flow with the nearest colour."""
    with torch.autocast(picture.device.type, enabled=False):
        fraction = torch.einsum("kc,bkhw->bchw", _wheel(picture.device), picture.float()) * (2 / 3)
        return fraction * (scale * math.hypot(*picture.shape[-2:]))


@lru_cache
def _wheel(device: torch.device) -> Tensor:
    """Return ``WHEEL``, float32[3, 2], without a copy from the host, for which a GPU would wait, in every call."""
    with torch.inference_mode(False):  # made in validation, it is also used in training
        return torch.tensor(WHEEL, device=device)
