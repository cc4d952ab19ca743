"""Motion of rollouts: errors of known motion, and tearing along the true flow."""

import numpy as np
import torch
from torch import Tensor, nn

from owl.pixels import flow_to_picture
from owl.rollout.evaluation import Clips
from owl.rollout.motion import decode_motion, end_point_curves, flow_between, warp_curves
from tests.helpers.shards import render

SIZE, CONTEXT, HORIZON = (64, 96), 2, 4


def clips(generated: Tensor | None = None) -> Clips:
    """True pictures of a texture that slides by a constant motion, as they are or with other generated ones."""
    episode = render(0, CONTEXT + HORIZON, SIZE)
    true = torch.from_numpy(np.stack(episode["rgb"])).movedim(-1, 1)[None]
    flow = torch.from_numpy(np.stack(episode["flow"])).movedim(-1, 1)[None, CONTEXT:]
    future = true[:, CONTEXT:] if generated is None else generated
    controls = torch.zeros(1, CONTEXT + HORIZON, 0)
    return Clips(true, future, controls, controls, {}, {}, flow=flow)


class AsDrawn(nn.Module):
    """Latents that are pictures already."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def decode(self, latent: Tensor) -> Tensor:
        return latent * self.weight


def test_motion_is_read_from_the_colours_of_its_picture() -> None:
    flow = torch.linspace(-3, 3, 2 * 3 * 2 * 8 * 8).reshape(2, 3, 2, 8, 8)
    pictures = torch.stack([flow_to_picture(frame, 0.5, (8, 8)) for frame in flow.unbind(1)], 1)
    torch.testing.assert_close(decode_motion(AsDrawn(), pictures, 0.5), flow, atol=1e-5, rtol=1e-5)


class Remembering(AsDrawn):
    """Decodes the mean of the latent and of the frame that it decoded before."""

    previous = True

    def decode(self, latent: Tensor, previous: Tensor | None = None) -> Tensor:
        return super().decode(latent if previous is None else (latent + previous) / 2)


def test_motion_is_decoded_with_the_frame_before_it() -> None:
    flow = torch.tensor([2.0, 1.0, -1.0])[None, :, None, None, None].expand(2, 3, 2, 8, 8) / 2
    pictures = torch.stack([flow_to_picture(frame, 0.5, (8, 8)) for frame in flow.unbind(1)], 1)
    found = decode_motion(Remembering().eval(), pictures, 0.5)
    expected = torch.tensor([2.0, 1.5, 0.25])[None, :, None, None, None].expand_as(flow) / 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_end_point_error_is_the_distance_from_the_motion_of_the_frames() -> None:
    moving = clips()
    frames = moving.true[:, CONTEXT - 1 :]
    motion = torch.stack([flow_between(frames[:, h], frames[:, h + 1]) for h in range(HORIZON)], 1)
    found = end_point_curves(moving, motion)
    assert max(found["motion_epe"]) < 1e-5
    shifted = end_point_curves(moving, motion + torch.tensor([3.0, 4.0])[:, None, None])["motion_epe"]
    np.testing.assert_allclose(shifted, 5, atol=1e-4)
    still = end_point_curves(moving, torch.zeros_like(motion))
    assert still["motion_epe"] == still["zero_motion_epe"]
    true = moving.flow[:, 0].norm(dim=1).mean()
    np.testing.assert_allclose(still["zero_motion_epe"], float(true), rtol=0.2)  # DIS finds the motion of the texture


def test_tearing_raises_the_warp_error_and_what_moves_as_it_should_does_not() -> None:
    whole = warp_curves(clips())
    assert whole["warp_error"] == whole["true_warp_error"]
    assert max(whole["warp_error"]) < 0.02
    torn = clips().future.clone()
    torn[:, 2, :, :, ::2] = torn[:, 2, :, :, ::2].flip(2)
    found = warp_curves(clips(torn))
    assert found["warp_error"][:2] == whole["warp_error"][:2]
    assert min(found["warp_error"][2:]) > 5 * max(whole["warp_error"])
    assert found["true_warp_error"] == whole["true_warp_error"]
