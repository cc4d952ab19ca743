"""Moving images along optical flow."""

import torch
import torch.nn.functional as F
from torch import Tensor

OCCLUSION_SHARPNESS = 50.0  # alpha of Lai et al. 2018


def warp(previous: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Move frames to where their content is one frame later.

    Args:
        previous: float[B, C, H, W].
        flow: float[B, 2, h, w], (dx, dy) in pixels of the frames, as datasets store it: what is at x in the current
            frame was at x + flow(x) in the previous one. A coarser grid is interpolated.

    Returns:
        float[B, C, H, W], the previous frame as seen from the current one (bicubic, so that fine detail survives), and
        bool[B, 1, H, W], whether a pixel comes from inside the previous frame; outside, its border is repeated.
    """
    height, width = previous.shape[-2:]
    flow = F.interpolate(flow.to(previous.dtype), (height, width), mode="bilinear", align_corners=False)
    column = torch.arange(width, device=flow.device, dtype=flow.dtype) + flow[:, 0]
    row = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None] + flow[:, 1]
    # as grid_sample counts: -1 and 1 are the outer edges of the first and the last pixel
    grid = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], -1)
    inside = (grid.abs() <= 1).all(-1).unsqueeze(1)
    return F.grid_sample(previous, grid, mode="bicubic", padding_mode="border", align_corners=False), inside


def visibility(current: Tensor, warped: Tensor, inside: Tensor) -> Tensor:
    """Weight of each pixel: low where it was occluded in the previous frame, or where the flow is wrong.

    Lai et al. 2018, "Learning Blind Video Temporal Consistency", section 3.2: exp(-50 |difference|^2) of the true
    frames.

    Args:
        current: float[B, C, H, W] in [0, 1], true frames.
        warped: The same shape; the true frames before them, as `warp` returns them.
        inside: bool[B, 1, H, W], as `warp` returns it.

    Returns:
        float[B, 1, H, W] in [0, 1].
    """
    return inside * torch.exp(-OCCLUSION_SHARPNESS * (current - warped).square().sum(1, keepdim=True))
