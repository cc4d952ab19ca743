"""A training step of the diffusion decoder: its random choices, its prediction, and what a discriminator compares."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from owl.flow_matching import SMALLEST_STEP, add_noise, each, logit_normal, shortcut_grid
from owl.recipes.randomness import step_generator, windows

SHORTCUT_LEVELS = 7
"""Step sizes 2^-level of shortcuts, level 0 to 6, each learned from two steps of half the size."""
SYNCHRONISED = 1 << 62
"""Added to a window's number where the noise of its latent is drawn, which differs from that of its target."""


@dataclass(frozen=True)
class Draws:
    """Random choices of a step, for each frame.

    Attributes:
        noise_level: float[N], t.
        step_size: float[N], d.
        known: bool[N], False where the latent is dropped.
        flow: int64[n], numbers of the frames that learn the flow.
        bootstrapped: int64[m], numbers of the frames that learn a shortcut.
        noise: float[N, *target], eps.
    """

    noise_level: Tensor
    step_size: Tensor
    known: Tensor
    flow: Tensor
    bootstrapped: Tensor
    noise: Tensor

    @property
    def estimated(self) -> Tensor:
        """int64[n], numbers of the frames whose estimate of x0 is compared: ``flow``, or one other if that is empty."""
        return self.flow if len(self.flow) else self.bootstrapped[:1]


@dataclass(frozen=True)
class Chances:
    """Distributions of the random choices of a step, arguments of `owl.recipes.diffusion_decoder.DiffusionDecoder`.

    Choices depend on the window and the step: the distribution over processes does not change the training.
    """

    logit_mean: float
    logit_std: float
    bootstrap: float
    latent_dropout: float
    noise_sync: float

    def draw(self, batch: dict[str, Tensor], step: int, target: tuple[int, ...], device: torch.device) -> Draws:
        """Draw the noise levels, step sizes and noise of a step.

        Args:
            batch: With ``rgb``, [B, T, ...].
            step: The trainer's ``global_step``.
            target: Shape of the target of a frame.
            device: Where the draws are stored.
        """
        frames, numbers = batch["rgb"].shape[1], windows(batch)
        # choices are drawn on the CPU, so that the number of shortcuts is known without synchronising a GPU
        chances = [step_generator(step, number, torch.device("cpu")) for number in numbers]
        noise_level = logit_normal(each(torch.randn, chances, frames), self.logit_mean, self.logit_std).flatten()
        dropped, chosen, level, place = each(torch.rand, chances, 4, frames).transpose(0, 1).flatten(1)
        bootstrapped = chosen < self.bootstrap
        d, t = shortcut_grid((level * SHORTCUT_LEVELS).long(), place)
        generators = [step_generator(step, number, device) for number in numbers]
        return Draws(
            torch.where(bootstrapped, t, noise_level).to(device),
            torch.where(bootstrapped, d, SMALLEST_STEP).to(device),
            (dropped >= self.latent_dropout).to(device),
            (~bootstrapped).nonzero().flatten().to(device),
            bootstrapped.nonzero().flatten().to(device),
            each(torch.randn, generators, frames, *target).flatten(0, 1),
        )

    def synchronise(self, batch: dict[str, Tensor], latent: Tensor, draws: Draws, step: int) -> tuple[Tensor, Draws]:
        """Add noise to some latents, and raise the noise level of their targets (``noise_sync``).

        Args:
            batch: See `draw`.
            latent: float[N, c, h, w].
            draws: From `draw`.
            step: See `draw`.
        """
        if not self.noise_sync:
            return latent, draws
        frames = batch["rgb"].shape[1]
        generators = [step_generator(step, SYNCHRONISED + number, latent.device) for number in windows(batch)]
        chosen, level = each(torch.rand, generators, 2, frames).transpose(0, 1).flatten(1)
        # shortcuts keep to their grid of noise levels
        level = torch.where(chosen < self.noise_sync, level, 0.0).index_fill(0, draws.bootstrapped, 0.0)
        noise = each(torch.randn, generators, frames, *latent.shape[1:]).flatten(0, 1)
        t = draws.noise_level
        return add_noise(latent, noise, level), replace(draws, noise_level=level + (1 - level) * t)


class Denoised(NamedTuple):
    """A prediction of the flow.

    Attributes:
        clean: float[N, *target], x0, standardised.
        estimate: float[N, *target], x_t - t v, the estimate of x0.
        noisy: float[N, *target], x_t.
        noise_level: float[N], t.
    """

    clean: Tensor
    estimate: Tensor
    noisy: Tensor
    noise_level: Tensor


def trajectory(clean: Tensor, noisy: Tensor, noise_level: Tensor) -> Tensor:
    """Return the end, the beginning and the noise level of a step to x0 as channels, for a discriminator.

    Zhao et al. 2025, "Epsilon-VAE: Denoising as Visual Decoding": D(x0, x_t, t), as in denoising diffusion GANs (Xiao
    et al. 2022).

    Args:
        clean: float[N, C, h, w], x0 or its estimate.
        noisy: The same shape, x_t.
        noise_level: float[N], t.

    Returns:
        float[N, 2 C + 1, h, w].
    """
    return torch.cat([clean, noisy, noise_level[:, None, None, None].expand_as(noisy[:, :1])], 1)
