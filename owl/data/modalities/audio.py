"""Sound."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from owl.data import codecs, game
from owl.data.modalities.base import Clock, RecordedModality, Sampling, Shapes, View, with_shape
from owl.errors import OwlError

FULL_SCALE = 2**15


class Audio(RecordedModality):
    """Audio samples int16[n, channels] per frame, at ``sample_rate`` samples per second.

    Windows contain float32[channels, samples] in [-1, 1], continuous from the start of the first frame to the end of
    the last one for any stride, with the same number of samples in every window. Mirroring swaps the channels.

    Raises:
        OwlError: Packing is enabled: sound is not cut at frames.
    """

    extension = "audio.npy"
    encode = staticmethod(codecs.encode_array)
    latent = "audio_latent"
    buffers = ("audio",)

    def __init__(self, name: str, description: Mapping[str, Any], sampling: Sampling) -> None:
        super().__init__(name, description, sampling)
        refuse_packing(name, sampling)
        self._channels = int(description["channels"])
        self._samples = Clock(description["sample_rate"], sampling.fps).least(sampling.span)

    @classmethod
    def describe(cls, sample_rate: int, channels: int, timing: str) -> dict[str, Any]:
        """Return its description for dataset.json; ``timing`` describes which sound belongs to a frame."""
        return {"extension": cls.extension, "sample_rate": sample_rate, "channels": channels, "timing": timing}

    @classmethod
    def describe_recorded(cls, size: tuple[int, int]) -> dict[str, Any]:
        timing = "frame t holds the sound of the tic from frame t-1 to frame t"
        return cls.describe(game.SAMPLE_RATE, game.CHANNELS, timing)

    @classmethod
    def record(cls, frame: game.Frame, previous: game.Frame) -> np.ndarray:
        """Return int16[1260, 2], left and right."""
        return frame.state.audio_buffer

    def frames(self, first: int, last: int) -> range:
        return range(first, last + 1)

    def shapes(self) -> Shapes:
        return {self.name: ((self._channels, self._samples), torch.float32)}

    def decode(self, content: bytes | memoryview) -> np.ndarray:
        array = codecs.decode_array(content)
        return with_shape(array, (len(array), self._channels))

    def assemble(self, frames: Iterable[np.ndarray], view: View, into: dict[str, np.ndarray], before: int = 0) -> None:
        audio = np.concatenate(list(frames))
        if len(audio) < self._samples:
            raise ValueError(f"a window holds {len(audio)} audio samples, expected {self._samples}")
        # mirroring swaps the left and the right channel
        swapped = view.mirrored and audio.shape[1] == 2
        channels = audio[: self._samples, ::-1] if swapped else audio[: self._samples]
        np.divide(channels.T, np.float32(FULL_SCALE), out=into[self.name])

    def levels(self, frames: Iterable[np.ndarray | None]) -> list[float]:
        """Return the peak of each frame; silence is 0."""
        return [
            0.0 if frame is None or not frame.size else float(np.abs(frame.astype(np.float32)).max()) / FULL_SCALE
            for frame in frames
        ]


@dataclass
class AudioLevels:
    """Level, clipping and silence of stored sound, accumulated over frames.

    Attributes:
        frames: Number of frames.
        silent: Frames whose samples are all zero.
        samples: Number of samples of all channels.
        clipped: Samples at full scale, the largest or smallest value of int16: the sound was probably cut off there.
        clipped_frames: Frames with at least one of these.
        peak: Largest magnitude, 0 to 1.
        energy: Sum of the squares, with 1 as full scale.
    """

    frames: int = 0
    silent: int = 0
    samples: int = 0
    clipped: int = 0
    clipped_frames: int = 0
    peak: float = 0.0
    energy: float = 0.0

    def add(self, frame: np.ndarray) -> None:
        """Add the sound of a frame, int16[n, channels]."""
        magnitude = np.abs(frame.astype(np.float32)) / FULL_SCALE
        clipped = int((magnitude >= 1 - 1 / FULL_SCALE).sum())
        peak = float(magnitude.max(initial=0.0))
        self.frames += 1
        self.silent += peak == 0
        self.samples += magnitude.size
        self.clipped += clipped
        self.clipped_frames += clipped > 0
        self.peak = max(self.peak, peak)
        self.energy += float(np.square(magnitude, dtype=np.float64).sum())

    def __str__(self) -> str:
        if self.silent == self.frames:
            return f"all of {self.frames:,} frames are silent"
        level = 10 * math.log10(self.energy / self.samples)
        clipped = (
            f"{self.clipped:,} samples clipped in {self.clipped_frames:,} frames" if self.clipped else "no clipping"
        )
        return (
            f"peak {20 * math.log10(self.peak):.1f} dBFS, RMS {level:.1f} dBFS, {clipped}, "
            f"{self.silent:,} of {self.frames:,} frames silent"
        )


def refuse_packing(name: str, sampling: Sampling) -> None:
    """Check that packing is disabled, for a modality that is continuous over a window instead of cut at frames.

    Raises:
        OwlError: Packing is enabled.
    """
    if sampling.pack:
        raise OwlError(
            "windows.pack",
            f"{name} of {sampling.url} cannot be packed, since it is not divided into frames; set pack to false, or "
            "use an audio_latent with the same number of tokens in every frame",
        )
