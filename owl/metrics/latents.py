"""What a latent space looks like: its scale, which of its channels live, how much it says."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from owl.nn.bottleneck import Encoding

DEAD_STD = 1e-2  # of the most varied channel
DEAD_SIGNAL = 1e-2  # variance of the mean over variance of the noise: half a log of 1.01, 0.005 nats at most


class LatentStatistics(Metric):
    """Statistics of the latents without noise over a dataset; keeps 8 c bytes per image until ``reset``.

    A channel is dead if its standard deviation is below 1% of that of the most varied channel, or its variance
    below 1% of the variance of their noise: then nothing of it survives sampling.

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
        # Moments of each image, not sums over all of them: no difference of large numbers even in float32.
        # Flat, because a process without images contributes an empty vector, which has one axis.
        self.add_state("means", [], dist_reduce_fx="cat")
        self.add_state("variances", [], dist_reduce_fx="cat")
        for name in ("noise", "images", *(f"sum_{loss}" for loss in losses)):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, encoding: Encoding) -> None:
        """Add the latents of a batch of images."""
        variance, mean = torch.var_mean(encoding.mean.detach().float(), dim=(2, 3), correction=0)
        self.means.append(mean.flatten())
        self.variances.append(variance.flatten())
        self.noise += encoding.variance.detach().mean() * len(mean)
        for name in self.losses:
            total = getattr(self, f"sum_{name}")
            total += getattr(encoding, name)().detach() * len(mean)
        self.images += len(mean)

    def compute(self) -> dict[str, Tensor]:
        """Statistics of everything so far.

        Returns:
            ``mean`` and ``std``: float[c], per channel, what later stages standardise latents with. And scalars:
            ``overall_mean``, ``overall_std``: of all elements. ``dead_channels``: their number.
            And each of the bottleneck's losses by its name, such as ``kl``: nats per latent element.
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
