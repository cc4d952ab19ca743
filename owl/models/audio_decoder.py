"""Convolutional decoder of an audio autoencoder's latents, a network of its own for training on a frozen encoder."""

import math
from typing import Any

import torch
from torch import Tensor

from owl.models import fingerprint
from owl.models.audio_autoencoder import AudioAutoencoder, Decoder, Norm, check_arguments, check_latent
from owl.nn.convolution import FoldableNetwork
from owl.nn.statistics import register_latent
from owl.nn.waveform import Stream


class AudioDecoder(FoldableNetwork):
    """Latents -> sound: the second half of `AudioAutoencoder`, without its encoder.

    Args:
        channels: As in `AudioAutoencoder`, like the others.
        sample_rate: Samples per second.
        strides: Factor of each stage, finest first.
        widths: Channels before each stage, finest first, and those after the last.
        latent_channels: Channels of the latent.
        causal: Whether no sample depends on later latents.
        norm: "weight" or "none".

    Attributes:
        decoder: float[B, c, N] -> float[B, channels, N * hop].
        hop: Samples per latent.
        inputs: Shape of a token by the name of the input, ``audio_latent``.
        audio_latent_mean: float[c], buffer; with ``audio_latent_std`` and ``audio_latent_encoder`` it identifies the
            latents; see `owl.latents`.
        config: The arguments above as plain values; building from them gives a network of the same shape.

    Raises:
        OwlError: The arguments do not describe a possible network.
    """

    audio_latent_mean: Tensor
    audio_latent_std: Tensor
    audio_latent_encoder: Tensor

    def __init__(
        self,
        channels: int,
        sample_rate: int,
        strides: list[int],
        widths: list[int],
        latent_channels: int,
        causal: bool = False,
        norm: Norm = "weight",
    ) -> None:
        super().__init__()
        check_arguments(channels, sample_rate, strides, widths, latent_channels, norm)
        self.config: dict[str, Any] = {
            "channels": channels,
            "sample_rate": sample_rate,
            "strides": list(strides),
            "widths": list(widths),
            "latent_channels": latent_channels,
            "causal": causal,
            "norm": norm,
        }
        self.channels = channels
        self.sample_rate = sample_rate
        self.hop = math.prod(strides)
        self.latent_channels = latent_channels
        self.inputs = {"audio_latent": (latent_channels,)}
        self.decoder = Decoder(channels, strides, widths, latent_channels, causal, norm)
        register_latent(self, "audio_latent", latent_channels)

    @classmethod
    def of(cls, autoencoder: AudioAutoencoder) -> "AudioDecoder":
        """Return a copy of an autoencoder's decoder, with the same outputs, that identifies the latents it takes."""
        decoder = cls(**autoencoder.config)
        decoder.decoder.load_state_dict(autoencoder.decoder.state_dict())
        decoder.audio_latent_mean.copy_(autoencoder.latent_mean)
        decoder.audio_latent_std.copy_(autoencoder.latent_std)
        decoder.audio_latent_encoder.copy_(torch.tensor(list(bytes.fromhex(fingerprint(autoencoder.encoder)))))
        return decoder

    def context(self) -> tuple[int, int]:
        """See `AudioAutoencoder.context`."""
        return self.decoder.context()

    def decode(self, latent: Tensor) -> Tensor:
        """Decode latents (not standardised).

        Args:
            latent: float[B, latent_channels, N].

        Returns:
            float[B, channels, N * hop], trained towards [-1, 1] but not clipped, in the dtype of ``latent``.

        Raises:
            OwlError: The latent has other channels or no steps.
        """
        check_latent(latent, self.latent_channels)
        audio: Tensor = self.decoder(latent)
        return audio.to(latent.dtype)

    def stream(self) -> Stream:
        """See `AudioAutoencoder.stream`."""
        return Stream(self.decoder)

    def forward(self, latent: Tensor) -> Tensor:
        """See `decode`."""
        return self.decode(latent)
