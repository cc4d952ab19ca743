"""The named, weighted terms of a loss that compares images with what they should equal."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

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
    """Computes those terms whose weights are not 0.

    Args:
        weights: Weight of every term; a recipe's own terms may stand among them.
        lpips: The perceptual distance.
        crop: Side in pixels of random squares on which LPIPS is computed: an unbiased estimate of the whole at less
            cost. None: whole images.
        samples: With ``crop``: how many samples of a batch are cropped. None: all.
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
        """Compare float[B, C, H, W] with what it should equal, of the same shape in [-1, 1].

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
        """Mean LPIPS, over random crops of some of the batch where wanted."""
        if self.crop is not None:
            reconstruction, image = random_crops(reconstruction, image, self.crop, self.samples)
        return self.lpips(reconstruction, image).mean()


def weighted_sum(terms: dict[str, Tensor], weights: ReconstructionWeights) -> Tensor:
    """Add up terms, each a scalar, by the weights of the same names; one without a weight counts as it is."""
    by_name = asdict(weights)
    return torch.stack([by_name.get(name, 1.0) * term for name, term in terms.items()]).sum()
