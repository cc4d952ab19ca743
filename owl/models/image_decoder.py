"""Convolutional decoder of an autoencoder's latents, a network of its own for training on a frozen encoder."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl.errors import OwlError
from owl.models import fingerprint
from owl.models.image_autoencoder import Decoder, ImageAutoencoder, Norm, check_arguments, check_latent, span
from owl.nn.convolution import FoldableNetwork, convolution
from owl.nn.statistics import register_latent


class ImageDecoder(FoldableNetwork):
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
        previous: Whether the decoder can take the frame that it decoded before as a second input, so that detail
            which one latent does not determine stays as it was; see `decode` and `decode_clips`. The frame enters as
            one vector for each position of the latent, where the convolutions span the largest motion, through a
            projection that is zero at first: the network then decodes as without it.

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
        previous: bool = False,
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
            "previous": previous,
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
        self.previous = previous
        if previous:
            self.grid, self.factor = grid, grid[0] // latent_size[0]
            self.hint = convolution(channels * self.factor**2, widths[-1], 1, gain=0, weight_norm=False)
        register_latent(self, "latent", latent_channels)

    @classmethod
    def of(cls, autoencoder: ImageAutoencoder, previous: bool = False) -> "ImageDecoder":
        """Return a copy of an autoencoder's decoder, with the same outputs, that identifies the latents it takes."""
        config = dict(autoencoder.config)
        config["blocks"] = config.pop("decoder_blocks")
        decoder = cls(**config, previous=previous)
        decoder.decoder.load_state_dict(autoencoder.decoder.state_dict())
        decoder.latent_mean.copy_(autoencoder.latent_mean)
        decoder.latent_std.copy_(autoencoder.latent_std)
        decoder.latent_encoder.copy_(torch.tensor(list(bytes.fromhex(fingerprint(autoencoder.encoder)))))
        return decoder

    def decode(self, latent: Tensor, previous: Tensor | None = None) -> Tensor:
        """Decode latents (not standardised).

        Args:
            latent: float[B, latent_channels, h, w].
            previous: float[B, channels, H, W], the decoded frames before these, clipped to [-1, 1] here; None at the
                start of an episode. Only of a network that was built with ``previous``.

        Returns:
            float[B, channels, H, W], trained towards [-1, 1] but not clipped, in the dtype of ``latent``.

        Raises:
            OwlError: An input has another shape, or the network takes no previous frame.
        """
        check_latent(latent, *self.inputs["latent"])
        image: Tensor = self.decoder(latent, None if previous is None else self._hint(latent, previous))
        return image.to(latent.dtype)

    def forward(self, latent: Tensor, previous: Tensor | None = None) -> Tensor:
        """See `decode`."""
        return self.decode(latent, previous)

    def _hint(self, latent: Tensor, previous: Tensor) -> Tensor:
        """float[B, channels, H, W] -> float[B, widths[-1], h, w]."""
        shape = (len(latent), self.channels, *self.size)
        if not self.previous or previous.shape != shape:
            takes = f"expected {list(shape)}; give" if self.previous else "which this decoder does not take; leave out"
            raise OwlError(
                "network.input",
                f"the decoder got a previous frame of {list(previous.shape)}, {takes} the frame that was decoded "
                "before, or build the decoder with previous",
            )
        previous = previous.clamp(-1, 1).to(latent.dtype)
        if self.grid != self.size:
            previous = F.interpolate(previous, self.grid, mode="bilinear", align_corners=False)
        hint: Tensor = self.hint(F.pixel_unshuffle(previous, self.factor))
        return hint


def decode_clips(decoder: nn.Module, latents: Tensor, together: int | None = None) -> Tensor:
    """Decode clips frame by frame as a stream would, with whatever the decoder remembers of the frames before.

    Args:
        decoder: A network with ``decode``. One with the attribute ``previous`` gets the frame that it decoded before,
            without gradient: its own errors, as at inference.
        latents: float[B, T, c, h, w], not standardised; each clip starts an episode.
        together: Maximum number of frames in one pass of a decoder without memory. None: all.

    Returns:
        float[B, T, 3, H, W].

    Raises:
        OwlError: A decoder that takes its previous frame is trained on clips of one frame.
    """
    if not getattr(decoder, "previous", False):
        parts = latents.flatten(0, 1).split(together or latents.shape[:2].numel())
        decoded = torch.cat([decoder.decode(part) for part in parts])  # type: ignore[operator]
        return decoded.unflatten(0, latents.shape[:2])
    if decoder.training and latents.shape[1] < 2:
        raise OwlError(
            "network.input",
            f"the decoder takes the frame that it decoded before, its clips have {latents.shape[1]} frame, expected at "
            "least 2 in training; set data.init_args.length",
        )
    frames: list[Tensor] = []
    for latent in latents.unbind(1):
        frames.append(decoder.decode(latent, frames[-1].detach() if frames else None))  # type: ignore[operator]
    return torch.stack(frames, 1)
