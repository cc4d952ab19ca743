"""Convolutional decoder of an autoencoder's latents, a network of its own for training on a frozen encoder."""

from typing import Any

import torch
from torch import Tensor, nn

from owl.models import fingerprint
from owl.models.image_autoencoder import Decoder, ImageAutoencoder, Norm, check_arguments, check_latent, span
from owl.nn.convolution import fold_weight_norm
from owl.nn.statistics import register_latent


class ImageDecoder(nn.Module):
    """Latent -> image: the second half of `ImageAutoencoder`, without its encoder.

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
        decoder: float[B, c, h, w] -> float[B, channels, H, W].
        inputs: Shape of the latent by the name of the input, ``latent``. The buffers ``latent_mean``, ``latent_std``
            and ``latent_encoder`` identify the latents; see `owl.latents`.
        config: The arguments above as plain values; building from them gives a network of the same shape.

    Raises:
        OwlError: The arguments do not describe a possible network.
    """

    latent_mean: Tensor
    latent_std: Tensor
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
        self.inputs = {"latent": (latent_channels, *self.latent_size)}
        grid = span(self.latent_size, widths, patch)
        self.decoder = Decoder(
            channels,
            self.size,
            grid,
            latent_channels,
            widths,
            blocks,
            patch,
            group_size,
            norm,
            middle_block,
            checkpoint,
        )
        register_latent(self, "latent", latent_channels)

    @classmethod
    def of(cls, autoencoder: ImageAutoencoder) -> "ImageDecoder":
        """Return a copy of an autoencoder's decoder, with the same outputs, that identifies the latents it takes."""
        config = dict(autoencoder.config)
        config["blocks"] = config.pop("decoder_blocks")
        decoder = cls(**config)
        decoder.decoder.load_state_dict(autoencoder.decoder.state_dict())
        decoder.latent_mean.copy_(autoencoder.latent_mean)
        decoder.latent_std.copy_(autoencoder.latent_std)
        decoder.latent_encoder.copy_(torch.tensor(list(bytes.fromhex(fingerprint(autoencoder.encoder)))))
        return decoder

    def decode(self, latent: Tensor) -> Tensor:
        """Decode latents (not standardised).

        Args:
            latent: float[B, latent_channels, h, w].

        Returns:
            float[B, channels, H, W], trained towards [-1, 1] but not clipped, in the dtype of ``latent``.

        Raises:
            OwlError: The latent has other channels or another size.
        """
        check_latent(latent, *self.inputs["latent"])
        image: Tensor = self.decoder(latent)
        return image.to(latent.dtype)

    def forward(self, latent: Tensor) -> Tensor:
        """See `decode`."""
        return self.decode(latent)

    def fold_weight_norm(self) -> "ImageDecoder":
        """Turn the weight-normalised convolutions into plain ones, in place: same outputs, faster, for inference.

        Returns:
            This network, now with ``config["norm"] == "none"`` if it was "weight".
        """
        fold_weight_norm(self)
        if self.config["norm"] == "weight":
            self.config["norm"] = "none"
        return self
