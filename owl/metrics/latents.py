"""Statistics of a latent space: scale, dead channels and bottleneck losses."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from owl.nn.bottleneck import Encoding

DEAD_STD = 1e-2  # of the most varied channel
DEAD_SIGNAL = 1e-2  # variance of the mean divided by that of the noise: at most log(1.01) / 2 = 0.005 nats


class LatentStatistics(Metric):
    """Statistics of the latents without noise over a dataset; stores 8 c bytes per image or sound until ``reset``.

    A channel is dead if its standard deviation is below 1% of that of the most varied channel, or its variance
    below 1% of the variance of their noise, so that sampling removes its information.

    Args:
        channels: c, the number of latent channels.
        losses: Names of the bottleneck's losses (see `owl.nn.bottleneck.Encoding`), which are measured too.
    """

    is_differentiable = False
    full_state_update = False

    means: list[Tensor]
    variances: list[Tensor]
    noise: Tensor
    images: Tensor

    def __init__(self, channels: int, losses: tuple[str, ...] = ("kl",)) -> None:
        super().__init__()
        self.channels = channels
        self.losses = losses
        # Moments per image instead of sums over all images avoid differences of large numbers in float32.
        # Flat, because a rank without images contributes an empty vector, which has one axis.
        self.add_state("means", [], dist_reduce_fx="cat")
        self.add_state("variances", [], dist_reduce_fx="cat")
        for name in ("noise", "images", *(f"sum_{loss}" for loss in losses)):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, encoding: Encoding) -> None:
        """Add the latents of a batch of images."""
        variance, mean = torch.var_mean(encoding.mean.detach().float().flatten(2), dim=2, correction=0)
        self.means.append(mean.flatten())
        self.variances.append(variance.flatten())
        self.noise += encoding.variance.detach().mean() * len(mean)
        for name in self.losses:
            total = getattr(self, f"sum_{name}")
            total += getattr(encoding, name)().detach() * len(mean)
        self.images += len(mean)

    def compute(self) -> dict[str, Tensor]:
        """Compute the statistics of all latents so far.

        Returns:
            ``mean`` and ``std``: float[c], per channel, with which later stages standardise latents. Scalars:
            ``overall_mean``, ``overall_std``: of all elements. ``dead_channels``: their number.
            Each of the bottleneck's losses by its name, such as ``kl``: nats per latent element.
        """
        means = dim_zero_cat(self.means).view(-1, self.channels)
        within = dim_zero_cat(self.variances).view(-1, self.channels).mean(dim=0)
        between, mean = torch.var_mean(means, dim=0, correction=0)
        variance = within + between
        std = variance.sqrt()
        overall_variance = variance.mean() + mean.var(correction=0)
        dead = (std < DEAD_STD * std.max()) | (variance < DEAD_SIGNAL * self.noise / self.images)
        return {
            "mean": mean,
            "std": std,
            "overall_mean": mean.mean(),
            "overall_std": overall_variance.sqrt(),
            "dead_channels": dead.sum().float(),
        } | {name: getattr(self, f"sum_{name}") / self.images for name in self.losses}
