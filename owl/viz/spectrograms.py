"""Spectrograms of versions of the same sound."""

import math

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

WIDTH, HEIGHT, DOTS_PER_INCH = 10.0, 2.2, 100  # inches, of the picture and of each spectrogram
LABELS = (100, 300, 1000, 3000, 10_000)  # Hz
LEVELS = (-80.0, 0.0)  # dB of full scale


def spectrograms(levels: dict[str, Tensor], seconds: float, sample_rate: int) -> np.ndarray:
    """Draw mel spectrograms below each other on one scale of colours.

    Args:
        levels: float[bands, frames] in dB of full scale (`owl.nn.spectrum.mel_decibels`) by caption.
        seconds: Duration of the sound.
        sample_rate: Samples per second.

    Returns:
        uint8[H, W, 3], RGB.
    """
    figure = Figure((WIDTH, HEIGHT * len(levels)), dpi=DOTS_PER_INCH, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(levels), 1, sharex=True, squeeze=False)[:, 0]
    ticks = [frequency for frequency in LABELS if frequency < sample_rate / 2]
    for axis, (caption, values) in zip(axes, levels.items(), strict=True):
        picture = axis.imshow(
            values.detach().float().cpu().numpy(),
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            cmap="inferno",
            vmin=LEVELS[0],
            vmax=LEVELS[1],
            extent=(0, seconds, 0, 1),
        )
        axis.set_title(caption, loc="left")
        axis.set_yticks([_mel(frequency) / _mel(sample_rate / 2) for frequency in ticks], [f"{f:g}" for f in ticks])
        axis.set_ylabel("Hz")
    axes[-1].set_xlabel("seconds")
    figure.colorbar(picture, ax=list(axes), label="dB of full scale", fraction=0.03, pad=0.01)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _mel(frequency: float) -> float:
    return 2595 * math.log10(1 + frequency / 700)
