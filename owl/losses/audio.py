"""Reconstruction losses of sound: multi-resolution spectrograms of all stereo mixes, and the waveform."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from owl.errors import OwlError
from owl.losses import pixel
from owl.nn.spectrum import spectrum

FFT_SIZES = (2048, 1024, 512, 256, 128, 64, 32)
FLOOR = 1e-4
"""-80 dB of full scale."""
QUIET = 1e-2
"""-40 dB of full scale."""


@dataclass
class AudioWeights:
    """Weight of every term of the loss; a term of weight 0 is not computed.

    Args:
        stft: Spectral convergence and logarithmic magnitudes at several resolutions, of left, right, their sum and
            their difference. It does not change when the polarity of the sound is reversed, so it needs a waveform term
            beside it.
        l1: Mean absolute error of the samples.
        l2: Mean squared error of the samples.
    """

    stft: float = 1.0
    l1: float = 2.5
    l2: float = 0.0


class AudioLoss(nn.Module):
    """Compute all terms with a non-zero weight, in float32.

    Args:
        weights: Weight of every term; can include terms of the recipe.
    """

    def __init__(self, weights: AudioWeights) -> None:
        super().__init__()
        self.weights = weights
        self.stft = MultiResolutionSTFT()

    def forward(self, reconstruction: Tensor, audio: Tensor) -> dict[str, Tensor]:
        """Compare float[B, C, n] with the target of the same shape in [-1, 1].

        Returns:
            A scalar for each term, unweighted.
        """
        with torch.autocast(audio.device.type, enabled=False):
            reconstruction, audio = reconstruction.float(), audio.float()
            terms: dict[str, Callable[[], Tensor]] = {
                "stft": lambda: self.stft(reconstruction, audio).mean(),
                "l1": lambda: pixel.l1(reconstruction, audio),
                "l2": lambda: pixel.l2(reconstruction, audio),
            }
            return {name: term() for name, term in terms.items() if getattr(self.weights, name)}


class MultiResolutionSTFT(nn.Module):
    """Distance of the magnitudes of spectrograms X of a reconstruction and Y of its target, at several resolutions.

    Yamamoto et al. 2020, "Parallel WaveGAN", eqs. 4 to 6: for each size |X - Y|_F / |Y|_F (spectral convergence) plus
    the mean of |log X - log Y|, averaged over the sizes. Stereo sound is compared as left, right, sum and difference
    (Steinmetz et al. 2020, "Automatic multitrack mixing with a differentiable mixing console"), of which each has the
    same weight.

    Magnitudes below ``floor`` are raised to it: what is inaudible has no gradient, and neither has silence an infinite
    one. |Y|_F is at least that of noise of level ``quiet``: the spectral convergence of silence, such as the difference
    of equal channels, would otherwise be a hundred times that of all other signals and rule the gradient. For louder
    signals the values are those of ``auraloss`` (Steinmetz and Reiss 2020) for a batch of one signal. There the
    spectral convergence of a batch is one quotient of its norms, so that loud sounds hide quiet ones; here it is a mean
    over signals. The transforms of sum and difference follow from those of left and right.

    Args:
        fft_sizes: Samples of a frame at each resolution; frames start a quarter of that apart, with Hann windows.
        floor: Magnitude relative to noise with a root mean square of 1.
        quiet: Likewise.
    """

    def __init__(self, fft_sizes: Sequence[int] = FFT_SIZES, floor: float = FLOOR, quiet: float = QUIET) -> None:
        super().__init__()
        self.fft_sizes = tuple(fft_sizes)
        self.floor, self.quiet = floor, quiet
        for size in self.fft_sizes:
            self.register_buffer(f"window_{size}", torch.hann_window(size), persistent=False)

    def forward(self, reconstruction: Tensor, audio: Tensor) -> Tensor:
        """Compare each sound of a batch with its target.

        Args:
            reconstruction: float[B, C, n], one or two channels.
            audio: The same shape.

        Returns:
            float[B].

        Raises:
            OwlError: The sound is too short for the largest frame.
        """
        shortest = max(self.fft_sizes) // 2 + 1
        if audio.shape[-1] < shortest:
            raise OwlError(
                "losses.too-short",
                f"the sound has {audio.shape[-1]} samples, the spectrograms need at least {shortest}; set "
                "data.init_args.length to more frames",
            )
        distances = []
        for size in self.fft_sizes:
            x, y = (self._magnitudes(sound, size) for sound in (reconstruction, audio))
            convergence = _level(x - y) / _level(y).clamp(min=self.quiet)
            distances.append(convergence + (x.log() - y.log()).abs().mean((2, 3)))
        return torch.stack(distances).mean((0, 2))

    def _magnitudes(self, audio: Tensor, size: int) -> Tensor:
        """float[B, C, n] -> float[B, 4 or C, frequencies, frames]."""
        channels = spectrum(audio, size, self.get_buffer(f"window_{size}"))
        if audio.shape[1] == 2:
            left, right = channels.unbind(1)
            channels = torch.stack([left, right, left + right, left - right], 1)
        return channels.abs().clamp(min=self.floor)


def _level(magnitudes: Tensor) -> Tensor:
    """Compute the root mean square of each signal: float[B, S, F, T] -> float[B, S]."""
    return torch.linalg.vector_norm(magnitudes, dim=(2, 3)) / magnitudes[0, 0].numel() ** 0.5
