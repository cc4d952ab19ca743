"""What recipes of decoders share: the autoencoder they start from, the latents of a batch, and metrics."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from owl import models
from owl.errors import OwlError
from owl.losses.lpips import LPIPS
from owl.metrics.flicker import FlickerAlongFlow
from owl.metrics.reconstruction import ReconstructionMetrics
from owl.models.image_autoencoder import ImageAutoencoder

DecoderFactory = Callable[[int, tuple[int, int], tuple[int, int], int], nn.Module]
"""A decoder without its geometry: called with channels, size, latent_size and latent_channels of an autoencoder."""


def load_autoencoder(path: str) -> ImageAutoencoder:
    """Load the autoencoder of stage 1, on whose latents a decoder is trained.

    Args:
        path: Checkpoint or export.

    Raises:
        OwlError: The file is missing or damaged, or contains another kind of network.
    """
    network = models.load(path)
    if not isinstance(network, ImageAutoencoder):
        raise OwlError(
            "network.kind",
            f"the network of {path} is a {type(network).__qualname__}, expected an ImageAutoencoder; set "
            "model.init_args.autoencoder to a checkpoint of the recipe owl.recipes.image_vae.ImageVAE",
        )
    return network


def built(factory: DecoderFactory, autoencoder: ImageAutoencoder) -> nn.Module:
    """Build a decoder for the latents and images of an autoencoder."""
    return factory(autoencoder.channels, autoencoder.size, autoencoder.latent_size, autoencoder.latent_channels)


def latents(batch: dict[str, Tensor]) -> Tensor:
    """Flatten the latents of a batch, which its dataset holds or `owl.callbacks.frozen_encoder.FrozenEncoder` adds.

    Args:
        batch: ``latent``: float[B, T, c, h, w].

    Returns:
        float[B * T, c, h, w], not standardised, in the same order as `owl.recipes.images.images`.

    Raises:
        OwlError: The batch has no latents, or in another form.
    """
    latent = batch.get("latent")
    if latent is None or latent.ndim != 5 or not latent.is_floating_point():
        found = "missing" if latent is None else f"{latent.dtype}{list(latent.shape)}"
        raise OwlError(
            "recipe.dataset",
            f"latent of a batch is {found}, expected float[B, T, c, h, w]; add "
            "owl.callbacks.frozen_encoder.FrozenEncoder to trainer.callbacks, or use a dataset of `data encode` with "
            "rgb and latent in data.init_args.modalities",
        )
    return latent.flatten(0, 1).float()


def with_noise(latent: Tensor, std: Tensor, strength: float) -> Tensor:
    """Add noise, so that a decoder tolerates the errors of generated latents.

    z + s std eps, with s ~ U(0, strength) for each sample and eps ~ N(0, 1) for each element.

    Args:
        latent: float[B, c, h, w], not standardised.
        std: float[c], standard deviation of each channel.
        strength: Largest standard deviation of the noise, relative to ``std``; 0 returns the latent unchanged.
    """
    if not strength:
        return latent
    level = strength * torch.rand(len(latent), 1, 1, 1, device=latent.device)
    return latent + level * std[:, None, None] * torch.randn_like(latent)


class DecoderMetrics(nn.Module):
    """PSNR, SSIM, LPIPS, the Fréchet distance and, of clips with optical flow, the flicker along it.

    Args:
        lpips: The perceptual distance; can be shared with the loss.
    """

    def __init__(self, lpips: LPIPS) -> None:
        super().__init__()
        self.reconstruction = ReconstructionMetrics(lpips)
        self.flicker = FlickerAlongFlow()

    def update(self, decoded: Tensor, image: Tensor, flow: Tensor | None) -> None:
        """Add decoded frames, float[B * T, 3, H, W], and their images, of the same shape in [-1, 1].

        Args:
            decoded: The decoder's output; clipped to [-1, 1].
            image: The truth.
            flow: float[B, T, 2, h, w] of the same frames, (dx, dy) back to the frame before; None or T = 1: the
                flicker is not measured.
        """
        self.reconstruction.update(decoded, image)
        if flow is not None and flow.shape[1] > 1:
            decoded, image = (
                (frames.float().clamp(-1, 1) + 1).div(2).unflatten(0, flow.shape[:2]) for frames in (decoded, image)
            )
            self.flicker.update(decoded, image, flow)

    def named(self, split: str) -> dict[str, Metric]:
        """Return each metric that was updated by its name in logs, such as ``val/psnr``."""
        named = self.reconstruction.named(split)
        if self.flicker.update_called:
            named[f"{split}/flicker"] = self.flicker
        return named
