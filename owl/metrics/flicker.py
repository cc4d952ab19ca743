"""Temporal flicker: detail that comes and goes from frame to frame, though nothing in the scene does."""

import torch
from torch import Tensor
from torchmetrics import Metric

from owl.errors import OwlError
from owl.losses.wavelet import haar


class Flicker(Metric):
    """How much more the fine detail of generated clips changes from frame to frame than that of true ones.

    The energy of a clip is the mean square of the difference between consecutive frames in the three high-frequency
    subbands of the Haar transform. Moving detail has energy too, so that of true clips of the same motion is
    subtracted. Independent noise of variance s^2 in every frame adds 2 s^2; blur makes the number negative.
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
            true: The same shape; clips under the same controls.

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
        """Scalars: ``flicker``, the generated clips' mean energy less the true ones', and ``flicker_true``, the
        latter, as a measure of what is much."""
        true = self.true / self.clips
        return {"flicker": self.generated / self.clips - true, "flicker_true": true}


def energy(clip: Tensor) -> Tensor:
    """Mean energy of the temporal difference in the high-frequency Haar subbands.

    Args:
        clip: float[B, T, C, H, W], T at least 2.

    Returns:
        float[B].
    """
    # the transform is linear: that of the difference is the difference of the transforms
    subbands = haar(clip[:, 1:].float() - clip[:, :-1].float(), 2)
    return subbands[..., 1:, :, :].square().flatten(1).mean(1)
