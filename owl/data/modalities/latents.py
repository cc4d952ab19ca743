"""Latents of frames and of sound, as the encoder returned them, not standardised."""

from collections.abc import Iterable, Mapping
from typing import Any

import cv2
import numpy as np
import torch

from owl.data import codecs
from owl.data.modalities.audio import refuse_packing
from owl.data.modalities.base import (
    Clock,
    Modality,
    Preview,
    Sampling,
    Shapes,
    View,
    finite,
    refuse_augmentation,
    with_shape,
)
from owl.errors import OwlError
from owl.viz.pictures import principal_components


class Latent(Modality):
    """Latents float16 of ``shape`` [c, h, w] per frame, independent of the size of delivered pictures.

    Windows contain float32[T, c, h, w], of every ``stride``-th frame. The description contains the encoder's
    fingerprint and the mean and standard deviation of each channel over the training split.

    Raises:
        OwlError: Mirroring or cropping is enabled.
    """

    extension = "latent.npy"
    encode = staticmethod(codecs.encode_array)

    def __init__(self, name: str, description: Mapping[str, Any], sampling: Sampling) -> None:
        super().__init__(name, description, sampling)
        refuse_augmentation(name, sampling)
        self._shape = tuple(description["shape"])

    def shapes(self) -> Shapes:
        return {self.name: ((self.sampling.length, *self._shape), torch.float32)}

    def decode(self, content: bytes | memoryview) -> np.ndarray:
        return finite(with_shape(codecs.decode_array(content), self._shape))

    def assemble(self, frames: Iterable[np.ndarray], view: View, into: dict[str, np.ndarray], before: int = 0) -> None:
        for latent, frame in zip(into[self.name], frames, strict=True):
            latent[:] = frame

    def facts(self) -> list[str]:
        return [*super().facts(), "shape " + "x".join(map(str, self._shape))]

    def preview(self, frames: Iterable[np.ndarray | None], size: tuple[int, int]) -> Preview | None:
        """Draw the first three principal components as red, green and blue, fitted on all frames together."""
        latents = list(frames)
        there = [latent for latent in latents if latent is not None]
        if not there:
            return Preview(latents)
        components, _ = principal_components(torch.from_numpy(np.stack(there)), 3)
        pictures = iter((components * 255).round().byte().movedim(1, -1).numpy())
        # enlarged without smoothing: a latent has few positions
        return Preview(
            [
                None
                if latent is None
                else cv2.resize(next(pictures), (size[1], size[0]), interpolation=cv2.INTER_NEAREST)
                for latent in latents
            ]
        )


class ConditioningLatent(Latent):
    """A latent that is given rather than generated, such as the layout of a scene."""

    extension = "conditioning_latent.npy"


class DepthLatent(Latent):
    """A latent of a depth map."""

    extension = "depth_latent.npy"


class MotionLatent(Latent):
    """A latent of the motion from the frame that is ``stride`` (1 if not described) stored frames earlier.

    Raises:
        OwlError: Mirroring, cropping or another stride is set: latents of motion cannot be composed.
    """

    extension = "motion_latent.npy"

    def __init__(self, name: str, description: Mapping[str, Any], sampling: Sampling) -> None:
        super().__init__(name, description, sampling)
        stride = description.get("stride", 1)
        if sampling.length > 1 and sampling.stride != stride:
            raise OwlError(
                "windows.stride",
                f"{name} of {sampling.url} is the motion over {stride} stored frames, but stride is {sampling.stride}; "
                f"set stride to {stride}, or encode with --motion_stride {sampling.stride}",
            )


class Trajectory(Latent):
    """Points float16 of ``shape`` [points, features] per frame, on the flow of a world model from noise to the frame.

    The points are x_t at each of ``noise_levels`` and then x0, of all generated streams, standardised, flattened and
    joined (`owl.rollout.clips.flat`). Windows contain float32[T, points, features]. An episode is a clip of ``length``
    frames, ``stride`` stored frames apart: the flow of a frame depends on the frames before it in its clip.

    Raises:
        OwlError: Mirroring, cropping, or another length or stride is set.
    """

    extension = "trajectory.npy"

    def __init__(self, name: str, description: Mapping[str, Any], sampling: Sampling) -> None:
        super().__init__(name, description, sampling)
        length, stride = description["length"], description["stride"]
        if sampling.length > 1 and (sampling.length, sampling.stride) != (length, stride):
            raise OwlError(
                "windows.trajectory",
                f"{name} of {sampling.url} follows clips of {length} frames with stride {stride}, but length is "
                f"{sampling.length} and stride {sampling.stride}; set them to those of the clips",
            )

    def preview(self, frames: Iterable[np.ndarray | None], size: tuple[int, int]) -> None:
        """Return None: what is standardised and flattened has no picture."""


class AudioLatent(Latent):
    """Audio latents float16[k, c] per frame: k tokens with c channels each. Windows are continuous for any stride.

    With ``shape`` [k, c] every frame has k tokens, and windows contain float32[T, stride * k, c]: for each frame the
    tokens since the previous frame of the window. At an episode's start, where there are fewer, the first token is
    repeated before them. With ``shape`` [c] and a ``rate`` in tokens per second, which need not be a multiple of the
    frame rate, frames may differ by one token, and windows contain float32[tokens, c], equally many in each window.

    Raises:
        OwlError: The description has neither form, or mirroring, cropping or (with ``rate``) packing is enabled.
    """

    extension = "audio_latent.npy"

    def __init__(self, name: str, description: Mapping[str, Any], sampling: Sampling) -> None:
        super().__init__(name, description, sampling)
        rate = description.get("rate")
        if (len(self._shape), rate is not None) not in ((2, False), (1, True)) or (rate is not None and not rate > 0):
            raise OwlError(
                "dataset.rate",
                f"{name} of {sampling.url} has shape {list(self._shape)} and rate {rate}, expected either shape "
                "[tokens per frame, channels] and no rate, or shape [channels] and a rate in tokens per second; "
                "correct dataset.json",
            )
        self._clock = Clock(rate, sampling.fps) if rate is not None else None
        if self._clock is not None:
            refuse_packing(name, sampling)
            self._tokens = self._clock.least(sampling.span)

    @classmethod
    def in_windows(cls, description: dict[str, Any], stride: int) -> dict[str, Any]:
        if len(description["shape"]) == 1:  # tokens at a rate of their own are not divided into frames
            return description
        tokens, channels = description["shape"]
        return description | {"shape": [stride * tokens, channels]}

    def frames(self, first: int, last: int) -> range:
        # the sound of the first frame starts after the frame one stride before it
        return range(first - min(self.sampling.stride - 1, first) if self._clock is None else first, last + 1)

    def shapes(self) -> Shapes:
        if self._clock is not None:
            return {self.name: ((self._tokens, *self._shape), torch.float32)}
        tokens, channels = self._shape
        return {self.name: ((self.sampling.length, self.sampling.stride * tokens, channels), torch.float32)}

    def decode(self, content: bytes | memoryview) -> np.ndarray:
        if self._clock is None:
            return super().decode(content)
        array = codecs.decode_array(content)
        least, most = self._clock.least(1), self._clock.most(1)
        if not (array.ndim == 2 and least <= len(array) <= most and array.shape[1:] == self._shape):
            raise ValueError(
                f"it has shape {list(array.shape)}, a frame at {self._clock.rate:g} tokens per second has "
                f"{least if least == most else f'{least} or {most}'} of {self._shape[0]} channels"
            )
        return finite(array)

    def assemble(self, frames: Iterable[np.ndarray], view: View, into: dict[str, np.ndarray], before: int = 0) -> None:
        tokens = np.concatenate(list(frames))
        if self._clock is None:
            missing = (self.sampling.stride - 1 - before) * self._shape[0]
            tokens = np.concatenate([tokens[:1].repeat(missing, 0), tokens])
            into[self.name][:] = tokens.reshape(into[self.name].shape)
            return
        if len(tokens) < self._tokens:
            raise ValueError(f"a window holds {len(tokens)} tokens, expected {self._tokens}")
        into[self.name][:] = tokens[: self._tokens]

    def preview(self, frames: Iterable[np.ndarray | None], size: tuple[int, int]) -> None:
        """Return None: tokens have no picture."""
