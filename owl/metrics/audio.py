"""Metrics of reconstructed sound. Silent sounds are left out, since distances relative to silence have no meaning."""

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio, signal_noise_ratio
from torchmetrics.utilities import dim_zero_cat

from owl.errors import OwlError
from owl.losses.audio import MultiResolutionSTFT
from owl.metrics.frechet import frechet_distance
from owl.nn.spectrum import mel_decibels

SILENCE = 1e-3
"""Root mean square below which a sound is silent: -60 dB of full scale."""
BLOCK = 441
"""Samples of the blocks in which `SilenceLevel` looks for silence."""
QUIETEST = -120.0
"""dB of full scale; the lowest level that `SilenceLevel` reports."""
EMBEDDING, EMBEDDING_RATE, EMBEDDING_FRAMES, EMBEDDING_HOP = 96, 16_000, 76, 38
"""Features, samples per second, frames (of 10 ms) of the network of `SpeechEmbedding`, and frames between features."""


class AudioMetrics(nn.Module):
    """SI-SDR, SNR, STFT and mel distance, the level in silence and, on demand, the Fréchet distance.

    Args:
        sample_rate: Samples per second.
        frechet: Whether to measure the Fréchet distance (`FrechetAudioDistance`).
    """

    def __init__(self, sample_rate: int, frechet: bool = False) -> None:
        super().__init__()
        self.distances = nn.ModuleDict(
            {
                "si_sdr": MeanOverHeard(si_sdr),
                "snr": MeanOverHeard(snr),
                "stft": MeanOverHeard(MultiResolutionSTFT()),
                "mel": MeanOverHeard(MelDistance(sample_rate)),
                "silence_level": SilenceLevel(),
            }
        )
        if frechet:
            self.distances[FrechetAudioDistance.name] = FrechetAudioDistance(sample_rate)

    def update(self, reconstruction: Tensor, audio: Tensor) -> None:
        """Add reconstructions, float[B, C, n], and their originals, of the same shape in [-1, 1]."""
        with torch.autocast(audio.device.type, enabled=False):
            reconstruction, audio = reconstruction.float().clamp(-1, 1), audio.float()
            for metric in self.distances.values():
                metric.update(reconstruction, audio)  # type: ignore[operator]

    def named(self, split: str) -> dict[str, Metric]:
        """Return each metric by its name in logs, such as ``val/si_sdr``."""
        return {f"{split}/{name}": metric for name, metric in self.distances.items()}  # type: ignore[misc]


def heard(audio: Tensor) -> Tensor:
    """Return which sounds of float[B, C, n] are not silent, bool[B]: louder than -60 dB of full scale."""
    return audio.square().mean((1, 2)) > SILENCE**2


def si_sdr(reconstruction: Tensor, audio: Tensor) -> Tensor:
    """Compute the scale-invariant signal-to-distortion ratio of sounds float[B, C, n], float[B] in dB.

    Le Roux et al. 2019, "SDR - half-baked or well done?". Both channels have one scale, so that a silent channel counts
    with its share of the energy. A sound of reversed polarity has the ratio of the original: see `snr`.
    """
    ratio: Tensor = scale_invariant_signal_distortion_ratio(reconstruction.flatten(1), audio.flatten(1))
    return ratio


def snr(reconstruction: Tensor, audio: Tensor) -> Tensor:
    """Compute the signal-to-noise ratio of sounds float[B, C, n], float[B] in dB: 10 log10 |y|^2 / |y - x|^2."""
    ratio: Tensor = signal_noise_ratio(reconstruction.flatten(1), audio.flatten(1))
    return ratio


class MelDistance(nn.Module):
    """Mean absolute difference of 128 mel bands between -80 and 0 dB of full scale, over channels and time, in dB.

    Args:
        sample_rate: Samples per second.
    """

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.sample_rate = sample_rate

    def forward(self, reconstruction: Tensor, audio: Tensor) -> Tensor:
        """Compare each sound of float[B, C, n] with its original: float[B]."""
        levels = (mel_decibels(sound, self.sample_rate) for sound in (reconstruction, audio))
        return torch.sub(*levels).abs().mean((1, 2, 3))


class MeanOverHeard(Metric):
    """Mean of a distance over the sounds whose original is not silent; NaN if all are.

    Args:
        distance: float[B, C, n], float[B, C, n] -> float[B].
    """

    is_differentiable = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.distance = distance
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, reconstruction: Tensor, audio: Tensor) -> None:
        """Add reconstructions and originals, float[B, C, n]."""
        chosen = heard(audio)
        if chosen.any():
            self.total += self.distance(reconstruction[chosen], audio[chosen]).sum()
            self.count += chosen.sum()

    def compute(self) -> Tensor:
        """Compute the mean, float[]."""
        return self.total / self.count


class SilenceLevel(Metric):
    """Level of the reconstruction where the original is silent, in dB of full scale, at least -120.

    Silence is where a block of 10 ms (at 44.1 kHz) is below -60 dB in the original and both blocks beside it, so that
    the edges of sounds do not count. -120 if there is none.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    energy: Tensor
    blocks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("energy", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("blocks", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, reconstruction: Tensor, audio: Tensor) -> None:
        """Add reconstructions and originals, float[B, C, n]."""
        noise, energy = (
            sound[..., : sound.shape[-1] // BLOCK * BLOCK].unflatten(-1, (-1, BLOCK)).square().mean((1, 3))
            for sound in (reconstruction, audio)
        )
        loud = nn.functional.max_pool1d(energy[:, None], 3, 1, 1)[:, 0]
        silent = loud < SILENCE**2
        self.energy += noise[silent].sum()
        self.blocks += silent.sum()

    def compute(self) -> Tensor:
        """Compute the level of the mean energy, float[]."""
        return (10 * torch.log10(self.energy / self.blocks.clamp(min=1))).clamp(min=QUIETEST)


class FrechetAudioDistance(Metric):
    """Distance between the Gaussians fitted to the features of real and of reconstructed sound.

    The definition of the Fréchet audio distance (Kilgour et al. 2019) with other features: those of Google's speech
    embedding network (see `SpeechEmbedding`), since the weights of VGGish are in no package. It hears what matters in
    speech and below 8 kHz: report it as `name`, and compare it with values of this metric for the same windows only.
    Sounds whose original is silent are left out.

    Args:
        sample_rate: Samples per second.

    Raises:
        OwlError: onnxruntime or openwakeword is not installed.
    """

    name = "fd_speech_embedding"
    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    real: list[Tensor]
    generated: list[Tensor]

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.features = SpeechEmbedding(sample_rate)
        # Flat, because a rank without sounds contributes an empty vector, which has one axis.
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("generated", [], dist_reduce_fx="cat")

    def update(self, reconstruction: Tensor, audio: Tensor) -> None:
        """Add reconstructions and originals, float[B, C, n] in [-1, 1], each of at least 0.8 seconds."""
        chosen = heard(audio)
        if chosen.any():
            self.real.append(self.features(audio[chosen]).flatten())
            self.generated.append(self.features(reconstruction[chosen]).flatten())

    def compute(self) -> Tensor:
        """Compute the distance over all sounds so far, float[]."""
        real, generated = (dim_zero_cat(state).view(-1, EMBEDDING) for state in (self.real, self.generated))
        return frechet_distance(real, generated).float().to(self.device)


class SpeechEmbedding:
    """Features of sound from the speech embedding network of Lin et al. 2020 ("Training Keyword Spotters with Limited
    and Synthesized Speech Data"), as the package openwakeword has it: it runs through onnxruntime, on the CPU.

    Args:
        sample_rate: Samples per second.

    Raises:
        OwlError: onnxruntime or openwakeword is not installed.
    """

    def __init__(self, sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self._sessions: list[Any] = []
        self._load()

    def __call__(self, audio: Tensor) -> Tensor:
        """Compute the features of windows of 0.76 seconds, half of that apart, of the mean of the channels.

        Args:
            audio: float[B, C, n] in [-1, 1].

        Returns:
            float32[B, windows, 96] on the device of ``audio``.

        Raises:
            OwlError: The sound is shorter than a window.
        """
        mono = audio.detach().float().mean(1).cpu().numpy()
        resampled = np.stack([soxr.resample(sound, self.sample_rate, EMBEDDING_RATE) for sound in mono])
        mel, network = self._load()
        # the networks expect the range of 16-bit integers, and mel levels scaled as here
        levels = mel.run(None, {"input": resampled * np.float32(2**15 - 1)})[0][:, 0] / 10 + 2
        if levels.shape[1] < EMBEDDING_FRAMES:
            raise OwlError(
                "metrics.too-short",
                f"the sound has {audio.shape[-1] / self.sample_rate:.2f} seconds, its Fréchet distance needs at least "
                "0.8; set data.init_args.validation_length to more frames, or model.init_args.frechet to false",
            )
        starts = range(0, levels.shape[1] - EMBEDDING_FRAMES + 1, EMBEDDING_HOP)
        windows = np.stack([levels[:, start : start + EMBEDDING_FRAMES] for start in starts], 1)
        features = network.run(None, {"input_1": windows.reshape(-1, *windows.shape[2:], 1)})[0]
        return torch.from_numpy(features.reshape(len(audio), -1, EMBEDDING)).to(audio.device)

    def __getstate__(self) -> dict[str, Any]:
        """Sessions cannot be copied or pickled."""
        return {"sample_rate": self.sample_rate, "_sessions": []}

    def _load(self) -> Sequence[Any]:
        """Return the sessions of the mel spectrogram and the network."""
        if not self._sessions:
            try:
                import onnxruntime

                package = distribution("openwakeword")  # importing it would import scikit-learn
            except (ImportError, PackageNotFoundError) as error:
                raise OwlError(
                    "metrics.package",
                    f"the Fréchet distance of sound needs onnxruntime and openwakeword ({error}); run pip install "
                    "'owl-platform[audio]', or set model.init_args.frechet to false",
                ) from error
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            folder = Path(str(package.locate_file("openwakeword/resources/models")))
            self._sessions = [
                onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
                for name in ("melspectrogram", "embedding_model")
            ]
        return self._sessions
