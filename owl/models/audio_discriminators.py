"""Discriminators of sound, to train decoders adversarially: spectrograms at several resolutions, and periods.

Both consist of several convolutional networks without norms that judge the same sound. Each returns logits and the
outputs of its hidden layers, which feature matching compares (`owl.losses.feature_matching`).
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl.errors import OwlError
from owl.models.audio_autoencoder import TYPICAL_LEVEL
from owl.nn.convolution import ACTIVATION_GAIN, NEGATIVE_SLOPE, initialise
from owl.nn.spectrum import spectrum

DILATIONS = (1, 2, 4)
"""In time, of the layers of an `STFTDiscriminator` that halve the frequencies."""
PERIOD_SLOPE = 0.1
"""Negative slope of the leaky ReLU of a `PeriodDiscriminator`."""


class Judgement(NamedTuple):
    """Output of one network of a discriminator.

    Attributes:
        logits: float[B, ...], higher for sound that seems real, one for each of many overlapping sections.
        features: Outputs of the hidden layers, float[B, C, ...] each.
    """

    logits: Tensor
    features: list[Tensor]


class AudioDiscriminator(nn.Module):
    """Base class: networks that judge the same sound.

    Args:
        channels: Channels of the sound.
        networks: Each maps float[B, channels, n] to a `Judgement`.
        shortest: Least number of samples that all of them can judge.

    Attributes:
        config: The arguments of the class as plain values; building from them gives a network of the same shape.
    """

    config: dict[str, Any]

    def __init__(self, channels: int, networks: list[nn.Module], shortest: int) -> None:
        super().__init__()
        self.channels, self.shortest = channels, shortest
        self.networks = nn.ModuleList(networks)

    def forward(self, audio: Tensor) -> list[Judgement]:
        """Judge sound.

        Args:
            audio: float[B, channels, n] in [-1, 1].

        Returns:
            One judgement of each network; logits in the dtype of ``audio`` also under autocast.

        Raises:
            OwlError: The sound has other channels or is too short.
        """
        if audio.ndim != 3 or audio.shape[1] != self.channels or audio.shape[2] < self.shortest:
            raise OwlError(
                "network.input",
                f"the discriminator got sound of {list(audio.shape)}, expected [batch, {self.channels}, samples] with "
                f"at least {self.shortest} samples; set data.init_args.length to more frames, or the discriminator's "
                "channels, fft_sizes or periods",
            )
        return [network(audio) for network in self.networks]


class MultiScaleSTFTDiscriminator(AudioDiscriminator):
    """Multi-scale complex STFT discriminator of EnCodec, one `STFTDiscriminator` for each size of the transform.

    Défossez et al. 2022, "High Fidelity Neural Audio Compression", section 3.4 and figure 2, with stereo sound as in
    Stable Audio (Evans et al. 2024): the real and imaginary parts of all channels are the input channels.

    Args:
        channels: Channels of the sound.
        fft_sizes: Samples of a frame of each network; frames start a quarter of that apart.
        width: Channels of the hidden layers.

    Raises:
        OwlError: The arguments do not describe a possible network.
    """

    def __init__(
        self,
        channels: int = 2,
        fft_sizes: list[int] = [2048, 1024, 512, 256, 128],  # noqa: B006  (never changed; a list is what YAML gives)
        width: int = 32,
    ) -> None:
        _check(channels=[channels], fft_sizes=fft_sizes, width=[width])
        if min(fft_sizes) < 4:
            raise OwlError("network.arguments", f"fft_sizes is {fft_sizes}, expected at least 4 each; correct it")
        super().__init__(channels, [STFTDiscriminator(channels, size, width) for size in fft_sizes], max(fft_sizes))
        self.config = {"channels": channels, "fft_sizes": list(fft_sizes), "width": width}


class MultiPeriodDiscriminator(AudioDiscriminator):
    """Multi-period discriminator of the Descript audio codec, one `PeriodDiscriminator` for each period.

    Kong et al. 2020, "HiFi-GAN", section 2.3; Kumar et al. 2023, "High-Fidelity Audio Compression with Improved RVQGAN"
    (DAC), section 3.4.

    Args:
        channels: Channels of the sound.
        periods: Samples from one column to the next, coprime so that they overlap little.
        widths: Channels of the hidden layers. All but the last keep every third row.

    Raises:
        OwlError: The arguments do not describe a possible network.
    """

    def __init__(
        self,
        channels: int = 2,
        periods: list[int] = [2, 3, 5, 7, 11],  # noqa: B006
        widths: list[int] = [32, 128, 512, 1024, 1024],  # noqa: B006
    ) -> None:
        _check(channels=[channels], periods=periods, widths=widths)
        super().__init__(channels, [PeriodDiscriminator(channels, period, widths) for period in periods], max(periods))
        self.config = {"channels": channels, "periods": list(periods), "widths": list(widths)}


class CombinedDiscriminator(AudioDiscriminator):
    """The networks of a `MultiScaleSTFTDiscriminator` and of a `MultiPeriodDiscriminator`, as in DAC.

    Args:
        channels: Channels of the sound.
        fft_sizes: As in `MultiScaleSTFTDiscriminator`.
        width: As in `MultiScaleSTFTDiscriminator`.
        periods: As in `MultiPeriodDiscriminator`.
        period_widths: Its ``widths``.

    Raises:
        OwlError: The arguments do not describe a possible network.
    """

    def __init__(
        self,
        channels: int = 2,
        fft_sizes: list[int] = [2048, 1024, 512, 256, 128],  # noqa: B006
        width: int = 32,
        periods: list[int] = [2, 3, 5, 7, 11],  # noqa: B006
        period_widths: list[int] = [32, 128, 512, 1024, 1024],  # noqa: B006
    ) -> None:
        spectra = MultiScaleSTFTDiscriminator(channels, fft_sizes, width)
        rows = MultiPeriodDiscriminator(channels, periods, period_widths)
        super().__init__(channels, [*spectra.networks, *rows.networks], max(spectra.shortest, rows.shortest))
        self.config = spectra.config | {"periods": list(periods), "period_widths": list(period_widths)}


class STFTDiscriminator(nn.Module):
    """Judges a complex spectrogram, [time, frequency].

    Args:
        channels: Channels of the sound.
        fft_size: Samples of a frame, with a Hann window; frames start a quarter of that apart.
        width: Channels of the hidden layers.
    """

    window: Tensor

    def __init__(self, channels: int, fft_size: int, width: int) -> None:
        super().__init__()
        self.fft_size = fft_size
        self.register_buffer("window", torch.hann_window(fft_size), persistent=False)
        layers = [_convolution(2 * channels, width, (3, 9), gain=1 / TYPICAL_LEVEL)]
        layers += [_convolution(width, width, (3, 9), stride=(1, 2), dilation=(d, 1)) for d in DILATIONS]
        layers.append(_convolution(width, width, (3, 3)))
        self.layers = nn.ModuleList(layers)
        self.head = _convolution(width, 1, (3, 3))

    def spectrogram(self, audio: Tensor) -> Tensor:
        """Compute real and imaginary parts, divided by the root of the window's energy.

        Args:
            audio: float[B, channels, n].

        Returns:
            float[B, 2 * channels, time, frequency], at least float32: the real parts of all channels first.
        """
        with torch.autocast(audio.device.type, enabled=False):
            audio = audio.to(torch.promote_types(audio.dtype, torch.float32))
            transformed = spectrum(audio, self.fft_size, self.window.to(audio.dtype), center=False)
            return torch.cat([transformed.real, transformed.imag], 1).transpose(2, 3)

    def forward(self, audio: Tensor) -> Judgement:
        """float[B, channels, n] -> logits float[B, time, frequency / 8] and features."""
        return _judge(self.spectrogram(audio), self.layers, self.head, NEGATIVE_SLOPE, audio.dtype)


class PeriodDiscriminator(nn.Module):
    """Judges the samples that are a period apart: sound as [n / period, period], convolved along the first axis.

    Args:
        channels: Channels of the sound.
        period: Samples from one row to the next.
        widths: Channels of the hidden layers.
    """

    def __init__(self, channels: int, period: int, widths: list[int]) -> None:
        super().__init__()
        self.period = period
        strides = [(3, 1)] * (len(widths) - 1) + [(1, 1)]
        gains = [1 / TYPICAL_LEVEL] + [ACTIVATION_GAIN] * (len(widths) - 1)
        self.layers = nn.ModuleList(
            _convolution(fine, coarse, (5, 1), stride=stride, gain=gain)
            for (fine, coarse), stride, gain in zip(pairwise([channels, *widths]), strides, gains, strict=True)
        )
        self.head = _convolution(widths[-1], 1, (3, 1))

    def forward(self, audio: Tensor) -> Judgement:
        """float[B, channels, n] -> logits float[B, rows, period] and features."""
        rows = F.pad(audio, (0, -audio.shape[-1] % self.period), mode="reflect").unflatten(2, (-1, self.period))
        return _judge(rows, self.layers, self.head, PERIOD_SLOPE, audio.dtype)


def _judge(x: Tensor, layers: nn.ModuleList, head: nn.Module, slope: float, dtype: torch.dtype) -> Judgement:
    """Apply hidden layers with leaky ReLUs and a head to float[B, C, H, W]."""
    features = []
    for layer in layers:
        x = F.leaky_relu(layer(x), slope)
        features.append(x)
    return Judgement(head(x).squeeze(1).to(dtype), features)


def _convolution(
    in_channels: int,
    out_channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    gain: float = ACTIVATION_GAIN,
) -> nn.Conv2d:
    """Weight-normalised convolution, padded so that a stride of 1 keeps the grid."""
    padding = (kernel[0] // 2 * dilation[0], kernel[1] // 2 * dilation[1])
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation)
    initialise(layer, gain, weight_norm=True)
    return layer


def _check(**arguments: list[int]) -> None:
    """Reject what is not positive, naming the argument."""
    for name, values in arguments.items():
        if min(values, default=0) < 1:
            raise OwlError(
                "network.arguments", f"{name} is {values}, expected one or more positive numbers; correct {name}"
            )
