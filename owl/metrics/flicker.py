"""Temporal flicker: changes of fine detail between frames that are not caused by motion."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from owl.errors import OwlError
from owl.losses.temporal import error_changes
from owl.losses.wavelet import haar


class Flicker(Metric):
    """Excess energy of frame-to-frame changes of fine detail in generated clips over true ones.

    The energy of a clip is the mean square of the difference between consecutive frames in the three high-frequency
    subbands of the Haar transform. Moving detail also has energy, so the energy of true clips with the same motion is
    subtracted. Independent noise of variance s^2 in every frame adds 2 s^2; blur makes the value negative.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    generated: Tensor
    true: Tensor
    clips: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("generated", "true", "clips"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, generated: Tensor, true: Tensor) -> None:
        """Add pairs of clips.

        Args:
            generated: float[B, T, C, H, W] in [0, 1], T at least 2.
            true: The same shape; clips with the same controls.

        Raises:
            OwlError: The shapes differ, or a clip has a single frame.
        """
        if generated.shape != true.shape or generated.ndim != 5 or generated.shape[1] < 2:
            raise OwlError(
                "flicker.shape",
                f"flicker got clips of {list(generated.shape)} and {list(true.shape)}; expected two equal shapes "
                "[batch, time, channels, height, width] with at least 2 frames",
            )
        self.generated += energy(generated).double().sum()
        self.true += energy(true).double().sum()
        self.clips += len(true)

    def compute(self) -> dict[str, Tensor]:
        """Return scalars: ``flicker``, the mean energy of the generated clips minus that of the true ones, and
        ``flicker_true``, the latter, as a reference."""
        true = self.true / self.clips
        return {"flicker": self.generated / self.clips - true, "flicker_true": true}


class FlickerAlongFlow(Metric):
    """How much the fine detail of a decoder's error changes from frame to frame, other than by moving with the scene.

    The error is the decoded frame minus the true one. The energy is the mean square, in the three high-frequency
    subbands of the Haar transform, of its difference from the error of the frame before, warped along the flow. The
    truth has none; independent noise of variance s^2 in every frame has 2 s^2; an error that sticks to the scene, such
    as blur or invented detail that moves along, has none either. With `Flicker` blur has less than none and may hide
    what flickers. The price is that the true clip must be known frame by frame: decoders have it, rollouts do not.

    Pixels are weighted by `owl.nn.warping.visibility`, measured on the true frames.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    energy: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("energy", "weight"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, decoded: Tensor, true: Tensor, flow: Tensor) -> None:
        """Add clips.

        Args:
            decoded: float[B, T, C, H, W] in [0, 1], T at least 2.
            true: The same shape; what was encoded.
            flow: float[B, T, 2, h, w], (dx, dy) back to the frame before, in pixels of the clips, as datasets deliver
                it; that of the first frame is not read.

        Raises:
            OwlError: The shapes do not fit, or a clip has a single frame.
        """
        change, seen = error_changes(decoded, true, flow)
        subbands = haar(change, 2)[..., 1:, :, :].square().mean((1, 2))  # [B * (T - 1), H / 2, W / 2]
        # a subband's pixel has the lowest weight of its 2x2 pixels
        weight = -F.max_pool2d(-seen, 2, ceil_mode=True).squeeze(1)
        self.energy += (weight * subbands).double().sum()
        self.weight += weight.double().sum()

    def compute(self) -> Tensor:
        """float[], at least 0; NaN if no pixel has any weight."""
        return self.energy / self.weight


def energy(clip: Tensor) -> Tensor:
    """Compute the mean energy of the temporal difference in the high-frequency Haar subbands.

    Args:
        clip: float[B, T, C, H, W], T at least 2.

    Returns:
        float[B].
    """
    # the transform is linear, so transform the difference
    subbands = haar(clip[:, 1:].float() - clip[:, :-1].float(), 2)
    return subbands[..., 1:, :, :].square().flatten(1).mean(1)
