"""Spectrograms: magnitudes of short-time Fourier transforms, and mel bands in decibels."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

MEL_BANDS = 128
MEL_FFT = 2048
SILENT_DECIBELS = -80.0
"""Level below which mel bands count as silent."""


def spectrum(audio: Tensor, fft_size: int, window: Tensor, center: bool = True) -> Tensor:
    """Compute the short-time Fourier transform with a hop of a quarter of its size.

    Divided by the root of the window's energy, so that white noise has its own root mean square as the root mean square
    of its magnitudes, for every size.

    Args:
        audio: float[..., n], n more than half of ``fft_size``.
        fft_size: Samples of a frame.
        window: float[fft_size], of the dtype of ``audio``.
        center: Whether frames are centred on multiples of the hop, with the sound mirrored at its ends. Otherwise they
            lie within the sound, whose n is at least ``fft_size``.

    Returns:
        complex[..., fft_size / 2 + 1, 1 + n // (fft_size / 4)]; without ``center``, of n - fft_size.
    """
    flat = audio.reshape(-1, audio.shape[-1])
    transformed = torch.stft(flat, fft_size, fft_size // 4, window=window, center=center, return_complex=True)
    return (transformed / window.square().sum().sqrt()).view(*audio.shape[:-1], *transformed.shape[1:])


def mel_decibels(audio: Tensor, sample_rate: int) -> Tensor:
    """Compute the levels of 128 mel bands, in dB of full scale, at least -80.

    Args:
        audio: float[..., n]; sound of less than 1,025 samples is completed with zeros.
        sample_rate: Samples per second.

    Returns:
        float32[..., 128, 1 + n // 512]. A full-scale sine has about 0 dB in its band.
    """
    audio = audio.float()
    audio = F.pad(audio, (0, max(0, MEL_FFT // 2 + 1 - audio.shape[-1])))
    window = torch.hann_window(MEL_FFT, device=audio.device)
    power = spectrum(audio, MEL_FFT, window).abs().square() * (6 / MEL_FFT)  # a sine's bins add up to its peak squared
    bands = mel_filters(sample_rate, MEL_FFT, MEL_BANDS).to(audio.device) @ power
    return (10 * torch.log10(bands.clamp(min=1e-20))).clamp(min=SILENT_DECIBELS)


@lru_cache
def mel_filters(sample_rate: int, fft_size: int, bands: int) -> Tensor:
    """Return triangular filters whose centres are equally spaced in mel = 2595 log10(1 + f / 700).

    Returns:
        float32[bands, fft_size / 2 + 1]; neighbouring filters add up to one between their centres.
    """
    frequencies = torch.linspace(0, sample_rate / 2, fft_size // 2 + 1, dtype=torch.float64)
    mel = 2595 * torch.log10(1 + frequencies / 700)
    position = mel / mel[-1] * (bands + 1)  # of each frequency, where the centre of band k is at k + 1
    centres = torch.arange(1, bands + 1, dtype=torch.float64)[:, None]
    return (1 - (position - centres).abs()).clamp(min=0).float()
