"""Convolutional decoder of an audio autoencoder's latents, a network of its own for training on a frozen encoder."""

import torch
from torch import Tensor

from owl.models import fingerprint
from owl.models.audio_autoencoder import AudioAutoencoder, Decoder, Norm, SoundDecoding
from owl.nn.statistics import register_latent


class AudioDecoder(SoundDecoding):
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
        super().__init__(channels, sample_rate, strides, widths, latent_channels, causal, norm)
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

    def forward(self, latent: Tensor) -> Tensor:
        """See `AudioAutoencoder.decode`."""
        return self.decode(latent)
