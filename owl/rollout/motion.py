"""Motion of rollouts: how well generated frames follow the generated motion, and whether they tear."""

import numpy as np
import torch
from torch import Tensor, nn

from owl.data.flow import estimate_flow, flow_downscale
from owl.models.image_decoder import decode_clips
from owl.nn.placement import placement
from owl.nn.warping import visibility, warp
from owl.pixels import picture_to_flow
from owl.rollout.evaluation import Clips


@torch.no_grad()
def decode_motion(decoder: nn.Module, latents: Tensor, scale: float) -> Tensor:
    """Decode motion latents of pictures of flow (`owl.pixels.flow_to_picture`).

    Args:
        decoder: Decoder of pictures; see `owl.models.image_decoder.decode_clips`.
        latents: float[B, T, c, h, w].
        scale: Scale of the flow in the dataset.

    Returns:
        float32[B, T, 2, H, W] on the CPU, (dx, dy) in pixels, back to the previous frame.
    """
    device, dtype = placement(decoder)
    clips = [decode_clips(decoder, clip.to(device, dtype))[0] for clip in latents.split(1)]
    return torch.stack([picture_to_flow(pictures, scale).cpu() for pictures in clips])


def end_point_curves(clips: Clips, motion: Tensor) -> dict[str, list[float]]:
    """Compute the end-point error of generated motion against the flow between generated frames.

    Args:
        clips: The rollouts.
        motion: Generated motion, float[B, H, 2, h, w], of `decode_motion`.

    Returns:
        ``motion_epe``: the mean distance in pixels in frame 1, 2, ... after the context, from the flow that OpenCV's
        DIS estimates; ``zero_motion_epe``: that of predicting no motion, as a reference.
    """
    frames = torch.cat([clips.true[:, clips.context - 1 : clips.context], clips.generated], 1)
    curves: dict[str, list[float]] = {"motion_epe": [], "zero_motion_epe": []}
    for h in range(clips.horizon):
        estimated = flow_between(frames[:, h], frames[:, h + 1])
        found = nn.functional.interpolate(motion[:, h], estimated.shape[-2:], mode="area")
        curves["motion_epe"].append(float((found - estimated).norm(dim=1).mean()))
        curves["zero_motion_epe"].append(float(estimated.norm(dim=1).mean()))
    return curves


def flow_between(previous: Tensor, current: Tensor) -> Tensor:
    """Estimate the flow back to the previous pictures, uint8[B, 3, H, W] each: float[B, 2, h, w] in pixels."""
    cell = flow_downscale((current.shape[-2], current.shape[-1]))
    pairs = zip(*(pictures.movedim(1, -1).numpy() for pictures in (previous, current)), strict=True)
    flows = [estimate_flow(before, after, cell) for before, after in pairs]
    return torch.from_numpy(np.stack(flows)).movedim(-1, 1)


def warp_curves(clips: Clips) -> dict[str, list[float]]:
    """Compute the warp error along the true flow, which tearing and flicker raise, and blur lowers.

    The error is the mean absolute difference between a frame and the frame before it, warped along the true flow, of
    values in [0, 1], weighted by `owl.nn.warping.visibility`.

    Args:
        clips: The rollouts, with ``flow``.

    Returns:
        ``warp_error`` of the generated frame 1, 2, ... after the context, and ``true_warp_error`` of the true frames,
        reconstructed by the autoencoder if they are pictures of the dataset.
    """
    assert clips.flow is not None
    given = clips.true[:, clips.context - 1 : clips.context]
    true = torch.cat([given, clips.future], 1)
    sides = {"": clips.generated, "true_": clips.future if clips.reconstructed is None else clips.reconstructed}
    curves: dict[str, list[float]] = {f"{side}warp_error": [] for side in sides}
    for h in range(clips.horizon):
        flow = clips.flow[:, h]
        before, now = (true[:, t].float() / 255 for t in (h, h + 1))
        weight = visibility(now, *warp(before, flow))
        for side, future in sides.items():
            before, now = (x.float() / 255 for x in (future[:, h - 1] if h else given[:, 0], future[:, h]))
            error = (now - warp(before, flow)[0]).abs().mean(1, keepdim=True)
            curves[f"{side}warp_error"].append(float((weight * error).sum() / weight.sum()))
    return curves
