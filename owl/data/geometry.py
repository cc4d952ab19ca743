"""Reprojection of pixels from one frame to another by depth and pose.

Coordinates:

- World: x, y on the ground and z up, right-handed, in map units (the player of the game is 56 high).
- Camera: x right, y down, z forward (OpenCV's).
- Picture: pixels from its top left corner, x right, y down; the centre of the first pixel is (0.5, 0.5).

Cameras are upright: they rotate only about the vertical axis, by ``angle``. The game looks up and down by a shear,
which moves the principal point and keeps the picture plane vertical. ``pitch`` is therefore part of the intrinsics, and
a rotation by it would apply it twice.

With a = angle, t = (x, y, z) and K = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], the point at pixel p and depth d is
t + R d K^-1 (p, 1), where the columns of R are right (sin a, -cos a, 0), down (0, 0, -1) and forward
(cos a, sin a, 0): Hartley and Zisserman, Multiple View Geometry (2004), equation 6.8.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from owl.pixels import DepthScale

MIDDLE = 1e-2  # of a pixel, up to which a point is in the middle of it


class Camera(NamedTuple):
    """Camera of a frame: ``pose`` and ``intrinsics`` of a window.

    Attributes:
        pose: float[..., 5]: x, y, z in map units; angle in degrees, counter-clockwise seen from above, 0 along x; pitch
            in degrees, down positive.
        intrinsics: float[..., 4]: focal lengths fx, fy and principal point cx, cy, in pixels of the frame.
    """

    pose: Tensor
    intrinsics: Tensor

    def rotation(self) -> Tensor:
        """Return the rotation from camera to world: float[..., 3, 3], with columns right, down and forward."""
        angle = self.pose[..., 3].deg2rad()
        sine, cosine, zero = angle.sin(), angle.cos(), torch.zeros_like(angle)
        right = torch.stack([sine, -cosine, zero], -1)
        down = torch.stack([zero, zero, zero - 1], -1)
        forward = torch.stack([cosine, sine, zero], -1)
        return torch.stack([right, down, forward], -1)

    def camera_to_world(self) -> Tensor:
        """Return the homogeneous float[..., 4, 4], as MegaSAM's ``cam_c2w`` (Li et al. 2024, arXiv:2412.04463)."""
        upper = torch.cat([self.rotation(), self.pose[..., :3, None]], -1)
        last = upper.new_tensor([0.0, 0, 0, 1]).expand(*upper.shape[:-2], 1, 4)
        return torch.cat([upper, last], -2)

    def matrix(self) -> Tensor:
        """Return the intrinsic matrix K: float[..., 3, 3]."""
        fx, fy, cx, cy = self.intrinsics.unbind(-1)
        zero, one = torch.zeros_like(fx), torch.ones_like(fx)
        rows = ((fx, zero, cx), (zero, fy, cy), (zero, zero, one))
        return torch.stack([torch.stack(row, -1) for row in rows], -2)


def map_units(depth: Tensor, description: Mapping[str, Any]) -> Tensor:
    """Convert depth of the game to distances along the viewing direction (not along the ray) in map units.

    The nearest level (the weapon) and the farthest (the sky, and everything beyond) are not valid distances.

    Args:
        depth: float in [0, 1], as in a window.
        description: Description of the modality ``depth`` in dataset.json, with ``step`` and ``offset``.
    """
    return DepthScale.of(description, "the dataset").distance(depth)


def backproject(depth: Tensor, camera: Camera) -> Tensor:
    """Compute the world coordinates of every pixel.

    Args:
        depth: float[..., H, W], along the viewing direction, in map units.
        camera: Camera of the depth map.

    Returns:
        float[..., H, W, 3].
    """
    height, width = depth.shape[-2:]
    y = torch.arange(height, device=depth.device)[:, None] + 0.5
    x = torch.arange(width, device=depth.device) + 0.5
    fx, fy, cx, cy = camera.intrinsics[..., None, None, :].unbind(-1)
    points = torch.stack([(x - cx) / fx * depth, (y - cy) / fy * depth, depth], -1)
    return points @ camera.rotation()[..., None, :, :].mT + camera.pose[..., None, None, :3]


def project(points: Tensor, camera: Camera) -> tuple[Tensor, Tensor]:
    """Project points of the world into a camera.

    Args:
        points: float[..., H, W, 3], world coordinates.
        camera: The camera.

    Returns:
        float[..., H, W, 2], (x, y) in its picture, possibly outside; and float[..., H, W], the distance along its
        viewing direction, in map units: points with a distance of 0 or less are behind it, with undefined positions.
    """
    x, y, z = ((points - camera.pose[..., None, None, :3]) @ camera.rotation()[..., None, :, :]).unbind(-1)
    fx, fy, cx, cy = camera.intrinsics[..., None, None, :].unbind(-1)
    return torch.stack([x / z * fx + cx, y / z * fy + cy], -1), z


def reproject(depth: Tensor, camera: Camera, other: Camera) -> tuple[Tensor, Tensor]:
    """Compute the position of each pixel of a frame in another frame, for a static scene.

    Args:
        depth: float[..., H, W] of the frame, along the viewing direction, in map units.
        camera: Camera of the frame.
        other: Camera of the other frame.

    Returns:
        As `project`. The first value minus the positions of the pixels is the optical flow of the static scene.
    """
    return project(backproject(depth, camera), other)


def warp(picture: Tensor, places: Tensor, mode: str = "bilinear") -> Tensor:
    """Sample a picture at positions.

    Args:
        picture: float[B, C, H, W].
        places: float[B, h, w, 2], (x, y) in pixels of the picture; positions outside give 0.
        mode: "bilinear", or "nearest" for values that must not be mixed, such as depth and labels.

    Returns:
        float[B, C, h, w].
    """
    height, width = picture.shape[-2:]
    grid = places / places.new_tensor([width, height]) * 2 - 1
    return F.grid_sample(picture, grid, mode=mode, padding_mode="zeros", align_corners=False)


def seen_from(depth: Tensor, camera: Camera, other: Camera) -> Tensor:
    """Compute the depth that another camera sees of the surfaces of a frame, for a static scene.

    Each pixel covers the four pixels around the place where it appears, and the nearest surface hides the others. Where
    surfaces have come so near that gaps open between their pixels, these are filled from a picture of half the size.

    Args:
        depth: float[B, H, W] of the frame, along the viewing direction, in map units; infinite where it is unknown.
        camera: Camera of the frame, with a batch dimension.
        other: The other camera; also of a picture of (H, W).

    Returns:
        float[B, H, W], infinite where no surface of the frame appears.
    """
    places, distance = reproject(depth, camera, other)
    height, width = depth.shape[-2:]
    fine, coarse = (_nearest(places / n, distance, (-(-height // n), -(-width // n))) for n in (1, 2))
    coarse = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width]
    return torch.where(fine.isfinite(), fine, coarse)


def _nearest(places: Tensor, distance: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute the distance of the nearest point in each pixel of a picture of a size, infinite without any.

    Args:
        places: float[B, H, W, 2], (x, y) of the points in pixels of the picture.
        distance: float[B, H, W]; points that are not in front of the camera, or not finite, do not count.
        size: (h, w) of the picture.

    Returns:
        float[B, h, w].
    """
    height, width = size
    known = distance.isfinite() & (distance > 0)
    corner = torch.where(known[..., None], places - 0.5, -2.0).clamp(-2, max(size) + 1)
    found = distance.new_full((len(distance), height * width), torch.inf)
    for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = ((corner + corner.new_tensor([right, down])).floor()).long().unbind(-1)
        covers = known & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        # a point in the middle of a pixel covers that alone
        share = (corner - torch.stack([column, row], -1)).abs()
        covers &= (share < 1 - MIDDLE).all(-1)
        cell = (row * width + column).clamp(0, height * width - 1)
        found.scatter_reduce_(1, cell.flatten(1), torch.where(covers, distance, torch.inf).flatten(1), "amin")
    return found.unflatten(1, size)


def agrees(depth: Tensor, camera: Camera, other_depth: Tensor, other: Camera, tolerance: float) -> Tensor:
    """Compute which pixels of a frame are visible in another frame, neither occluded nor outside.

    Args:
        depth: float[B, H, W] of the frame, in map units.
        camera: Camera of the frame, with a batch dimension.
        other_depth: float[B, H, W] of the other frame.
        other: Camera of the other frame.
        tolerance: Largest difference in depth of the same surface, in map units.

    Returns:
        bool[B, H, W].
    """
    places, distance = reproject(depth, camera, other)
    height, width = other_depth.shape[-2:]
    inside = (places >= 0).all(-1) & (places[..., 0] < width) & (places[..., 1] < height) & (distance > 0)
    seen = warp(other_depth[:, None], places, "nearest")[:, 0]
    return inside & ((seen - distance).abs() <= tolerance)
