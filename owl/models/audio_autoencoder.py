"""Convolutional KL autoencoder of sound (Oobleck), the first stage of world models that are heard."""

import math
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl.errors import OwlError
from owl.nn.convolution import FoldableNetwork
from owl.nn.posterior import Posterior
from owl.nn.snake import SnakeBeta
from owl.nn.waveform import (
    SNAKE_GAIN,
    Blocks,
    Convolution1d,
    Down1d,
    ResidualUnit,
    Stream,
    Sum,
    Unblocks,
    Up1d,
    reach,
)

Norm = Literal["weight", "none"]

DILATIONS = (1, 3, 9)
"""Of the residual units of a stage."""
TYPICAL_LEVEL = 0.1
"""Root mean square of sound: the first layer scales it to about one."""
LOGVAR_BOUND = 15.0  # as in `owl.models.image_autoencoder`
INITIAL_LOGVAR = -4.0  # likewise


class SoundDecoding(FoldableNetwork):
    """What `AudioAutoencoder`, whose arguments it takes, has in common with its decoder as a network of its own."""

    decoder: "Decoder"

    def __init__(
        self,
        channels: int,
        sample_rate: int,
        strides: list[int],
        widths: list[int],
        latent_channels: int,
        causal: bool,
        norm: Norm,
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

    def context(self) -> tuple[int, int]:
        """Return the latents before and after latent k on which its samples depend.

        `decode` of a chunk with that many latents on both sides, cropped, equals `decode` of the whole.
        """
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
        """Return a decoder for chunks of latents.

        A chunk float[B, latent_channels, n] gives the samples that are determined by the latents so far: all samples
        of its latents in the causal form, otherwise those that depend on no later latent. Pass ``last=True`` with the
        last chunk. Together they equal `decode` of all latents. Each layer keeps the steps that it needs again, so
        nothing is computed twice.
        """
        return Stream([self.decoder])


class AudioAutoencoder(SoundDecoding):
    """Sound -> Gaussian latents, one per ``hop`` samples -> sound.

    The fully convolutional autoencoder of Stable Audio (Evans et al. 2024, "Oobleck"), after the Descript audio codec
    (Kumar et al. 2023): one stage per stride, each with three dilated residual units and a strided convolution, with
    SnakeBeta activations and weight normalisation, but neither norms nor a middle block. Any length of sound is valid.

    In addition, a learned linear map between each block of ``hop`` samples and its latent runs beside the convolutions
    of encoder and decoder. It starts as the lowest frequencies of a discrete cosine transform, and the convolutions
    start at zero: before the first step the autoencoder is a low-pass filter, from which it learns phases at once.
    Convolutions alone must find a common phase first, which takes thousands of steps.

    Latent k describes the samples from ``k * hop`` to ``(k + 1) * hop - 1``. It depends on the samples of `span`, and
    they depend on the latents of `context`. In the causal form a latent depends on no sample after its own, and samples
    depend on no later latent, so that sound can be played while it is generated.

    Args:
        channels: Channels of the sound.
        sample_rate: Samples per second. The network works at any; datasets are checked against it.
        strides: Factor of each stage, finest first, each at least 2. Their product is the hop.
        widths: Channels before each stage, finest first, and those after the last.
        latent_channels: Channels of the latent.
        causal: Whether nothing depends on what comes later.
        norm: "weight" (weight normalisation) or "none" (plain convolutions, as after folding).

    Attributes:
        encoder: float[B, channels, N * hop] -> (mean float[B, c, N], logvar float[B, 1, N]).
        decoder: float[B, c, N] -> float[B, channels, N * hop].
        hop: Samples per latent.
        losses: Names of the bottleneck's losses, each a method of the result of `encode`.
        latent_mean: float[c], buffer: mean of each latent channel in the last validation; zeros until measured.
        latent_std: float[c], buffer: its standard deviation; ones until measured.
        config: The arguments above as plain values; building from them gives a network of the same shape.

    Raises:
        OwlError: The arguments do not describe a possible network.
    """

    losses: ClassVar[tuple[str, ...]] = ("kl",)
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        channels: int = 2,
        sample_rate: int = 44_100,
        strides: list[int] = [3, 5, 7, 7],  # noqa: B006  (never changed; a list is what YAML gives)
        widths: list[int] = [32, 64, 128, 256, 512],  # noqa: B006
        latent_channels: int = 64,
        causal: bool = False,
        norm: Norm = "weight",
    ) -> None:
        super().__init__(channels, sample_rate, strides, widths, latent_channels, causal, norm)
        self.encoder = Encoder(channels, strides, widths, latent_channels, causal, norm)
        self.decoder = Decoder(channels, strides, widths, latent_channels, causal, norm)
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    @property
    def tsr(self) -> float:
        """Tensor-size reduction: samples of all channels per element of the latent."""
        return self.channels * self.hop / self.latent_channels

    @property
    def modalities(self) -> dict[str, int]:
        """Channels of each modality that ``encode`` takes."""
        return {"audio": self.channels}

    def span(self, k: int) -> tuple[int, int]:
        """Return the first and the last sample on which latent ``k`` depends; those outside the sound are padding."""
        first, last = reach([*self.encoder.trunk, self.encoder.mean], k, k)
        return first, last

    def encode(self, audio: Tensor) -> Posterior:
        """Encode sound.

        Args:
            audio: float[B, channels, n] in [-1, 1]; zeros complete its last latent.

        Returns:
            The posterior over float[B, latent_channels, ceil(n / hop)], in the dtype of ``audio`` also under autocast.

        Raises:
            OwlError: The sound has other channels or no samples.
        """
        check_sound(audio, self.channels)
        mean, logvar = self.encoder(F.pad(audio, (0, -audio.shape[-1] % self.hop)))
        return Posterior(mean.to(audio.dtype), logvar.to(audio.dtype))

    def forward(self, audio: Tensor, sample: bool) -> tuple[Tensor, Posterior]:
        """Reconstruct sound.

        Args:
            audio: float[B, channels, n] in [-1, 1].
            sample: Whether to decode a sample of the posterior (training) instead of its mean.

        Returns:
            The reconstruction, float[B, channels, n], and the posterior.
        """
        posterior = self.encode(audio)
        reconstruction = self.decode(posterior.sample() if sample else posterior.mean)
        return reconstruction[..., : audio.shape[-1]], posterior


class Encoder(nn.Module):
    """The first half of ``AudioAutoencoder``, whose arguments it shares."""

    def __init__(
        self, channels: int, strides: list[int], widths: list[int], latent_channels: int, causal: bool, norm: Norm
    ) -> None:
        super().__init__()
        shared: dict[str, Any] = {"causal": causal, "weight_norm": norm == "weight"}
        depth = len(strides) * len(DILATIONS)
        trunk: list[nn.Module] = [Convolution1d(channels, widths[0], 7, gain=1 / TYPICAL_LEVEL, **shared)]
        for stride, (fine, coarse) in zip(strides, pairwise(widths), strict=True):
            trunk += (ResidualUnit(fine, dilation, depth, **shared) for dilation in DILATIONS)
            trunk += [SnakeBeta(fine), Down1d(fine, coarse, stride, gain=SNAKE_GAIN, **shared)]
        self.trunk = nn.Sequential(*trunk, SnakeBeta(widths[-1]))
        self.mean = Convolution1d(widths[-1], latent_channels, 3, gain=0, **shared)
        self.logvar = Convolution1d(widths[-1], 1, 3, gain=0, **shared)
        hop = math.prod(strides)
        self.shortcut = Blocks(channels, latent_channels, hop, 1 / latent_level(channels, latent_channels, hop))
        with torch.no_grad():
            self.logvar.convolution.bias.fill_(INITIAL_LOGVAR)  # type: ignore[union-attr]

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """float[B, channels, N * hop] -> mean float[B, c, N], logvar float[B, 1, N]."""
        x = self.trunk(audio)
        # Bounded smoothly: a hard clamp has no gradient outside, so the log-variance could not recover.
        return self.mean(x) + self.shortcut(audio), LOGVAR_BOUND * torch.tanh(self.logvar(x) / LOGVAR_BOUND)


class Decoder(Sum):
    """The second half of ``AudioAutoencoder``: float[B, c, N] -> float[B, channels, N * hop]."""

    def __init__(
        self, channels: int, strides: list[int], widths: list[int], latent_channels: int, causal: bool, norm: Norm
    ) -> None:
        shared: dict[str, Any] = {"causal": causal, "weight_norm": norm == "weight"}
        depth = len(strides) * len(DILATIONS)
        layers: list[nn.Module] = [Convolution1d(latent_channels, widths[-1], 7, **shared)]
        for stride, (fine, coarse) in reversed([*zip(strides, pairwise(widths), strict=True)]):
            layers += [SnakeBeta(coarse), Up1d(coarse, fine, stride, gain=SNAKE_GAIN, **shared)]
            layers += (ResidualUnit(fine, dilation, depth, **shared) for dilation in DILATIONS)
        head = Convolution1d(widths[0], channels, 7, gain=0, bias=False, **shared)
        hop = math.prod(strides)
        shortcut = Unblocks(latent_channels, channels, hop, latent_level(channels, latent_channels, hop))
        super().__init__(nn.Sequential(*layers, SnakeBeta(widths[0]), head), shortcut)
        self.hop = hop

    def context(self) -> tuple[int, int]:
        """Return the latents before and after latent k on which its samples depend."""
        first, last = reach([self], 0, self.hop - 1)
        return -first, last


def latent_level(channels: int, latent_channels: int, hop: int) -> float:
    """Return the root mean square of orthonormal coefficients that hold all of a sound of `TYPICAL_LEVEL`."""
    return TYPICAL_LEVEL * math.sqrt(channels * hop / latent_channels)


def check_sound(audio: Tensor, channels: int) -> None:
    """Reject sound that is not float[B, channels, n] with n at least 1.

    Raises:
        OwlError: The sound has another shape.
    """
    if audio.ndim != 3 or audio.shape[1] != channels or audio.shape[2] < 1:
        raise OwlError(
            "network.input",
            f"the sound is {list(audio.shape)}, expected [batch, {channels}, samples]; convert it to {channels} "
            "channels, or set the network's channels",
        )


def check_latent(latent: Tensor, channels: int) -> None:
    """Reject latents that are not float[B, channels, N] with N at least 1.

    Raises:
        OwlError: The latent has another shape.
    """
    if latent.ndim != 3 or latent.shape[1] != channels or latent.shape[2] < 1:
        raise OwlError(
            "network.input",
            f"the latent is {list(latent.shape)}, expected [batch, {channels}, latents]; use latents of the "
            "autoencoder that the decoder belongs to, channels before time",
        )


def check_arguments(
    channels: int, sample_rate: int, strides: list[int], widths: list[int], latent_channels: int, norm: str
) -> None:
    """Check the arguments; the error names the invalid value."""
    if norm not in ("weight", "none"):
        raise OwlError("network.arguments", f'norm is "{norm}", expected "weight" or "none"')
    for name, values in (
        ("channels", [channels]),
        ("sample_rate", [sample_rate]),
        ("latent_channels", [latent_channels]),
        ("widths", widths or [0]),
    ):
        if min(values) < 1:
            raise OwlError("network.arguments", f"{name} is {list(values)}, expected positive numbers; correct {name}")
    if min(strides, default=0) < 2:
        raise OwlError("network.arguments", f"strides is {strides}, expected factors of at least 2; correct strides")
    if len(widths) != len(strides) + 1:
        raise OwlError(
            "network.arguments",
            f"widths is {widths}, expected {len(strides) + 1} numbers, one before each of {strides=} and one after the "
            "last; correct widths",
        )
