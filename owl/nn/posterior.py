"""The diagonal Gaussian an encoder predicts."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian over a latent, with one log-variance shared by the channels of a position (as in LTX-Video).

    An `owl.nn.bottleneck.Encoding` with one loss, ``kl``.

    The shared variance keeps the channels of a latent on one scale, which a diffusion model on top of it needs;
    it also means that scaling the latent by s changes every log-variance by 2 log s.

    Attributes:
        mean: float[B, c, h, w]; of sound float[B, c, N], as the other tensors.
        logvar: float[B, 1, h, w], natural logarithm of the variance.
    """

    mean: Tensor
    logvar: Tensor

    @property
    def variance(self) -> Tensor:
        """Variance of the noise that `sample` adds to the mean, float32[B, 1, h, w]."""
        return self.logvar.float().exp()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw a latent with the reparameterisation trick.

        Args:
            generator: Generator of the noise, on the device of ``mean``; default: the global one.

        Returns:
            float[B, c, h, w], the dtype of ``mean``.
        """
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """Compute the Kullback-Leibler divergence from the standard normal distribution.

        Returns:
            Scalar >= 0 in nats per latent element, mean over the batch, in float32 or wider.
        """
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        mean, logvar = self.mean.to(dtype), self.logvar.to(dtype)
        # The terms in logvar are the same for every channel, so their mean needs no expansion to c channels.
        return 0.5 * (mean.square().mean() + (torch.expm1(logvar) - logvar).mean())
