"""Named, weighted terms of a reconstruction loss."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from owl.losses import pixel
from owl.losses.lpips import LPIPS, random_crops
from owl.losses.wavelet import dwt


@dataclass
class ReconstructionWeights:
    """Weight of every term of the loss; a term of weight 0 is not computed.

    Args:
        l1: Mean absolute error of the pixels.
        l2: Mean squared error of the pixels.
        logit_laplace: Negative log-likelihood under the logit-Laplace distribution (DALL-E's dVAE).
        lpips: Learned perceptual distance.
        dwt: L1 over the subbands of an orthonormal Haar wavelet transform (LTX-Video).
    """

    l1: float = 1.0
    l2: float = 0.0
    logit_laplace: float = 0.0
    lpips: float = 0.5
    dwt: float = 0.0


class ReconstructionLoss(nn.Module):
    """Compute all terms with a non-zero weight.

    Args:
        weights: Weight of every term; can include terms of the recipe.
        lpips: The perceptual distance.
        crop: Side in pixels of random squares on which LPIPS is computed, an unbiased estimate at a lower cost. None:
            whole images.
        samples: With ``crop``: number of samples of a batch that are cropped. None: all.
    """

    def __init__(
        self, weights: ReconstructionWeights, lpips: LPIPS, crop: int | None = None, samples: int | None = None
    ) -> None:
        super().__init__()
        self.weights = weights
        self.lpips = lpips
        self.crop = crop
        self.samples = samples

    def forward(self, reconstruction: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Compare float[B, C, H, W] with the target image of the same shape in [-1, 1].

        Returns:
            A scalar for each term, unweighted.
        """
        terms: dict[str, Callable[[], Tensor]] = {
            "l1": lambda: pixel.l1(reconstruction, image),
            "l2": lambda: pixel.l2(reconstruction, image),
            "logit_laplace": lambda: pixel.logit_laplace(reconstruction, image),
            "lpips": lambda: self.perceptual(reconstruction, image),
            "dwt": lambda: dwt(reconstruction, image),
        }
        return {name: term() for name, term in terms.items() if getattr(self.weights, name)}

    def perceptual(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        """Compute the mean LPIPS, on random crops of some samples if configured."""
        if self.crop is not None:
            reconstruction, image = random_crops(reconstruction, image, self.crop, self.samples)
        return self.lpips(reconstruction, image).mean()


def weighted_sum(terms: dict[str, Tensor], weights: Any) -> Tensor:
    """Sum scalar terms with the weights of the same names.

    Args:
        terms: Scalars by name.
        weights: A mapping or a dataclass; terms without a weight have weight 1.
    """
    by_name = weights if isinstance(weights, Mapping) else asdict(weights)
    return torch.stack([by_name.get(name, 1.0) * term for name, term in terms.items()]).sum()
