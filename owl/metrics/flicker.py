"""Temporal flicker: changes of fine detail between frames that are not caused by motion."""

import torch
from torch import Tensor
from torchmetrics import Metric

from owl.errors import OwlError
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
