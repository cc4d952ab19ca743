"""Sound."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from owl.data import codecs
from owl.data.modalities.base import Clock, Modality, Sampling, Shapes, View, with_shape
from owl.errors import OwlError


class Audio(Modality):
    """Samples int16[n, channels] a frame, on a clock of ``sample_rate`` a second.

    Delivered as float32[channels, samples] in [-1, 1], unbroken from the first frame's beginning to the last frame's
    end whatever the stride, the same number of samples for every window. Mirroring swaps the ears.

    Raises:
        OwlError: Windows are to be packed: sound is not cut at frames.
    """

    extension = "audio.npy"
    encode = staticmethod(codecs.encode_array)

    def __init__(self, name: str, description: Mapping[str, Any], sampling: Sampling) -> None:
        super().__init__(name, description, sampling)
        refuse_packing(name, sampling)
        self._channels = int(description["channels"])
        self._samples = Clock(description["sample_rate"], sampling.fps).least(sampling.span)

    @classmethod
    def describe(cls, sample_rate: int, channels: int, timing: str) -> dict[str, Any]:
        """What dataset.json says of it; ``timing`` says which sound a frame holds."""
        return {"extension": cls.extension, "sample_rate": sample_rate, "channels": channels, "timing": timing}

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
            raise ValueError(f"a window holds {len(audio)} audio samples, {self._samples} were expected")
        # the left ear of a mirrored window hears what the right one did
        swapped = view.mirrored and audio.shape[1] == 2
        channels = audio[: self._samples, ::-1] if swapped else audio[: self._samples]
        np.divide(channels.T, np.float32(2**15), out=into[self.name])

    def levels(self, frames: Iterable[np.ndarray | None]) -> list[float]:
        """Peaks; silence is 0."""
        return [
            0.0 if frame is None or not frame.size else float(np.abs(frame.astype(np.float32)).max()) / 2**15
            for frame in frames
        ]


def refuse_packing(name: str, sampling: Sampling) -> None:
    """Refuse to pack what runs on through a window instead of being cut at frames.

    Raises:
        OwlError: Windows are to be packed.
    """
    if sampling.pack:
        raise OwlError(
            "windows.pack",
            f"{name} of {sampling.url} cannot be packed, it is not cut at frames; set pack to false, or use an "
            "audio_latent with the same number of tokens in every frame",
        )
