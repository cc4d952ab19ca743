"""What recipes of decoders share: the autoencoder they start from, the latents of a batch, and metrics."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from owl import models
from owl.errors import OwlError
from owl.losses.lpips import LPIPS
from owl.metrics.flicker import FlickerAlongFlow
from owl.metrics.reconstruction import ReconstructionMetrics
from owl.models.image_autoencoder import ImageAutoencoder
from owl.recipes.images import form
from owl.viz.film import side_by_side
from owl.viz.pictures import comparison_grid

SHOWN = 4
"""Frames of a picture."""
SHORTEST_CLIP = 4
"""Frames below which a window is not worth watching."""

Network = TypeVar("Network", bound=nn.Module)

DecoderFactory = Callable[[int, tuple[int, int], tuple[int, int], int], nn.Module]
"""A decoder without its geometry: called with channels, size, latent_size and latent_channels of an autoencoder."""


def load_autoencoder(path: str) -> ImageAutoencoder:
    """Load the autoencoder of stage 1, on whose latents a decoder is trained.

    Args:
        path: Checkpoint or export.

    Raises:
        OwlError: The file is missing or damaged, or contains another kind of network.
    """
    return load_network(path, ImageAutoencoder, "owl.recipes.image_vae.ImageVAE")


def load_network(path: str, kind: type[Network], recipe: str) -> Network:
    """Load the autoencoder of a decoder's stage 1.

    Args:
        path: Checkpoint or export.
        kind: The class that it must have.
        recipe: Recipe that trains such a network, for the message.

    Raises:
        OwlError: The file is missing or damaged, or contains another kind of network.
    """
    network = models.load(path)
    if not isinstance(network, kind):
        raise OwlError(
            "network.kind",
            f"the network of {path} is a {type(network).__qualname__}, expected an {kind.__qualname__}; set "
            f"model.init_args.autoencoder to a checkpoint of the recipe {recipe}",
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
        raise OwlError(
            "recipe.dataset",
            f"latent of a batch is {form(latent)}, expected float[B, T, c, h, w]; add "
            "owl.callbacks.frozen_encoder.FrozenEncoder to trainer.callbacks, or use a dataset of `data encode` with "
            "rgb and latent in data.init_args.modalities",
        )
    return latent.flatten(0, 1).float()


def flow_of(batch: dict[str, Tensor]) -> Tensor:
    """Return the optical flow of a batch of clips, along which neighbouring frames are compared.

    Args:
        batch: ``flow``: float[B, T, 2, h, w] with T at least 2.

    Raises:
        OwlError: The batch has no flow, or its windows are single frames.
    """
    flow = batch.get("flow")
    if flow is None or flow.ndim != 5 or flow.shape[1] < 2:
        raise OwlError(
            "recipe.dataset",
            f"flow of a batch is {form(flow)}, expected float[B, T, 2, h, w] with T at least 2; add flow to "
            "data.init_args.modalities (recordings and imports store it with `--flow true`) and set "
            "data.init_args.length to 2 or more, or leave out what compares frames",
        )
    return flow


def few(frames: Tensor) -> Tensor:
    """Return up to `SHOWN` evenly spaced frames of a batch, float[B, ...], for a picture."""
    return frames[:: max(1, len(frames) // SHOWN)][:SHOWN]


def compared(versions: dict[str, Tensor], length: int) -> dict[str, np.ndarray]:
    """Draw versions of the same frames for a recipe's ``media``.

    Args:
        versions: Frames float[B * length, 3, H, W] by caption, in [-1, 1] or clipped to it.
        length: Frames of a window.

    Returns:
        ``decoders``, uint8[H, W, 3], and the result of `clips`.
    """
    picture = comparison_grid({caption: few(frames) for caption, frames in versions.items()})
    return {"decoders": picture} | clips(versions, length)


def clips(versions: dict[str, Tensor], length: int) -> dict[str, np.ndarray]:
    """Draw the first window of a batch as a clip, if it is long enough to be watched.

    Args:
        versions: Frames float[B * length, 3, H, W] by caption, in [-1, 1] or clipped to it.
        length: Frames of a window.

    Returns:
        ``clip``, uint8[length, height, width, 3], for a recipe's ``media``; empty for a window of fewer than 4 frames.
    """
    if length < SHORTEST_CLIP:
        return {}
    return {"clip": side_by_side({caption: frames[:length] for caption, frames in versions.items()})}


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
