"""Convolutional encoder that imitates the encoder of an autoencoder."""

from typing import Any

import torch
from torch import Tensor

from owl.models.image_autoencoder import Encoder, Norm, check_arguments, check_image, span
from owl.nn.convolution import FoldableNetwork
from owl.nn.posterior import Posterior


class ImageEncoder(FoldableNetwork):
    """Image -> Gaussian latent: the first half of `owl.models.image_autoencoder.ImageAutoencoder`, without a decoder.

    It is trained to give the latents of another encoder (`owl.recipes.distill_encoder.DistillEncoder`). Decoders and
    world models of that encoder's latents take its latents too, so it identifies itself by the fingerprint of that
    encoder, not by the hash of its own weights.

    Args:
        channels: Channels of the image.
        size: (height, width) of the image in pixels.
        latent_size: (height, width) of the latent in positions.
        latent_channels: Channels of the latent, a divisor of the last width.
        widths: Channels of each stage, finest first; four times each is a multiple of the next.
        blocks: Residual blocks of each stage, finest first.
        patch: Side in pixels of the patch of one position.
        group_size: Channels per group of the 3x3 convolutions in the blocks; None: dense.
        norm: As in `ImageAutoencoder`.
        middle_block: As in `ImageAutoencoder`.
        checkpoint: Whether training recomputes the blocks' activations in the backward pass to save memory.

    Attributes:
        encoder: float[B, channels, H, W] -> (mean float[B, c, h, w], logvar float[B, 1, h, w]).
        latent_encoder: uint8[8], buffer: fingerprint of the imitated encoder; zeros until trained.
        modalities: Channels of each modality that ``encode`` takes.
        config: The arguments above as plain values; building from them gives a network of the same shape.

    Raises:
        OwlError: The arguments do not describe a possible network.
    """

    latent_encoder: Tensor

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        latent_size: tuple[int, int],
        latent_channels: int,
        widths: list[int] = [64, 128, 256],  # noqa: B006  (never changed; a list is what YAML gives)
        blocks: list[int] = [1, 2, 2],  # noqa: B006
        patch: int = 2,
        group_size: int | None = None,
        norm: Norm = "weight",
        middle_block: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_arguments(channels, size, latent_size, latent_channels, widths, blocks, blocks, patch, group_size, norm)
        self.config: dict[str, Any] = {
            "channels": channels,
            "size": list(size),
            "latent_size": list(latent_size),
            "latent_channels": latent_channels,
            "widths": list(widths),
            "blocks": list(blocks),
            "patch": patch,
            "group_size": group_size,
            "norm": norm,
            "middle_block": middle_block,
            "checkpoint": checkpoint,
        }
        self.channels = channels
        self.size = (size[0], size[1])
        self.latent_size = (latent_size[0], latent_size[1])
        self.latent_channels = latent_channels
        self.modalities = {"rgb": channels}
        self.encoder = Encoder(
            channels,
            self.size,
            span(self.latent_size, widths, patch),
            latent_channels,
            widths,
            blocks,
            patch,
            group_size,
            norm,
            middle_block,
            checkpoint,
        )
        self.register_buffer("latent_encoder", torch.zeros(8, dtype=torch.uint8))

    def encode(self, image: Tensor) -> Posterior:
        """Encode images; see `ImageAutoencoder.encode`."""
        check_image(image, self.channels, *self.size)
        mean, logvar = self.encoder(image)
        return Posterior(mean.to(image.dtype), logvar.to(image.dtype))

    def forward(self, image: Tensor) -> Posterior:
        """See `encode`."""
        return self.encode(image)
