"""Temporal consistency of decoders: how the error changes from one frame to the next, other than by moving along."""

import torch
from torch import Tensor

from owl.errors import OwlError
from owl.nn.warping import visibility, warp


def temporal(decoded: Tensor, true: Tensor, flow: Tensor) -> Tensor:
    """Penalise what flickers: the mean absolute change of the error along the flow, over the visible pixels.

    The short-term loss of Lai et al. 2018, "Learning Blind Video Temporal Consistency", equation 4, of the error
    (decoded minus true) instead of the decoded frame. The true clip then has loss 0 even where light changes, a
    surface is seen at another angle or the flow is wrong, and blur that moves with the scene costs nothing here, so
    the other terms decide about it. It counts every frequency, and linearly: `owl.metrics.flicker.FlickerAlongFlow`,
    which counts energy in the high frequencies, stays a measure that is not itself optimised.

    Gradients reach both frames of a pair. Through the later one alone, a decoder of single frames would be drawn
    towards the error that it happened to make in the frame before.

    Args:
        decoded: float[B, T, C, H, W] in [-1, 1], T at least 2.
        true: The same shape; what was encoded.
        flow: float[B, T, 2, h, w], as datasets deliver it; see `error_changes`.

    Returns:
        float[], in the unit of an L1 loss. Pixels that were not visible in the frame before count as 0.

    Raises:
        OwlError: The shapes do not fit, or a clip has a single frame.
    """
    change, visible = error_changes(decoded / 2 + 0.5, true / 2 + 0.5, flow)
    return 2 * (visible * change.abs()).mean()


def error_changes(decoded: Tensor, true: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the difference between the error of each frame and that of the frame before, warped along the flow.

    Args:
        decoded: float[B, T, C, H, W] in [0, 1], T at least 2.
        true: The same shape; what was encoded.
        flow: float[B, T, 2, h, w], (dx, dy) back to the frame before, in pixels of the clips, as datasets deliver it;
            that of the first frame is not read.

    Returns:
        float32[B * (T - 1), C, H, W], and float32[B * (T - 1), 1, H, W] in [0, 1], `owl.nn.warping.visibility` of the
        true frames.

    Raises:
        OwlError: The shapes do not fit, or a clip has a single frame.
    """
    if (
        decoded.shape != true.shape
        or true.ndim != 5
        or true.shape[1] < 2
        or flow.ndim != 5
        or flow.shape[:3] != (*true.shape[:2], 2)
    ):
        raise OwlError(
            "flicker.shape",
            f"flicker along the flow got clips of {list(decoded.shape)} and {list(true.shape)} and flow of "
            f"{list(flow.shape)}, expected two equal shapes [batch, time, channels, height, width] with at least 2 "
            "frames, and two channels of flow for each frame",
        )
    before, now = true[:, :-1].flatten(0, 1).float(), true[:, 1:].flatten(0, 1).float()
    error = decoded.float() - true.float()
    steps = flow[:, 1:].flatten(0, 1).float()
    with torch.no_grad():
        visible = visibility(now, *warp(before, steps))
    return error[:, 1:].flatten(0, 1) - warp(error[:, :-1].flatten(0, 1), steps)[0], visible
