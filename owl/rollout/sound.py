"""Sound of rollouts: decoded frame by frame, and compared with the true sound."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from owl.nn.placement import placement
from owl.nn.spectrum import MEL_FFT, mel_decibels

MEL_HOP = MEL_FFT // 4
ATTACK = "ATTACK"
LISTENED = 0.2
"""Seconds after an action in which its sound starts."""


class SoundDecoder:
    """Decode the sound of a rollout frame by frame: together the frames are the decoded whole, without seams.

    Args:
        decoder: Network whose method ``stream`` returns a decoder of chunks of latents, such as
            `owl.models.audio_autoencoder.AudioAutoencoder`.
        context: Latents of the frames before the first one, float[B, F, k, c]; their sound is not returned.
    """

    def __init__(self, decoder: nn.Module, context: Tensor | None = None) -> None:
        self._decoder = decoder
        self._stream = decoder.stream()  # type: ignore[operator]
        self._skip = 0
        if context is not None:
            self._skip = context.shape[1] * context.shape[2] * int(decoder.hop)  # type: ignore[arg-type]
            self(context.flatten(1, 2))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Add the latents of a frame, float[B, k, c].

        Returns:
            float[B, channels, samples], the sound that is now determined: that of the frame if the decoder is causal,
            otherwise without the part that depends on later latents, which follows with the next frames.
        """
        latents = tokens.to(placement(self._decoder).dtype).transpose(1, 2)
        sound: Tensor = self._stream(latents).float()
        skipped = min(self._skip, sound.shape[-1])
        self._skip -= skipped
        return sound[..., skipped:]

    def copy(self) -> "SoundDecoder":
        """Copy the state; the network is shared."""
        return deepcopy(self, {id(module): module for module in self._decoder.modules()})


def decode_sound(decoder: nn.Module, latents: Tensor) -> Tensor:
    """Decode the latents of whole clips.

    Args:
        decoder: Network with ``decode(float[B, c, tokens]) -> float[B, channels, samples]``.
        latents: float[B, T, k, c].

    Returns:
        float32[B, T, channels, n] on the CPU, the n samples of each frame, clipped to [-1, 1].
    """
    device, dtype = placement(decoder)
    sound: Tensor = decoder.decode(latents.to(device, dtype).flatten(1, 2).transpose(1, 2))  # type: ignore[operator]
    return by_frame(sound.float().clamp(-1, 1).cpu(), latents.shape[1])


def by_frame(sound: Tensor, frames: int) -> Tensor:
    """Divide sound into frames: float[..., channels, frames * n] -> float[..., frames, channels, n]."""
    return sound.unflatten(-1, (frames, -1)).movedim(-2, -3)


def joined(sound: Tensor) -> Tensor:
    """Undo `by_frame`."""
    return sound.movedim(-3, -2).flatten(-2)


@dataclass(frozen=True)
class Sound:
    """Sound of short rollouts, and the true sound under the same controls.

    Attributes:
        true: float[B, context + H, channels, n] in [-1, 1], n samples of each frame.
        generated: float[B, H, channels, n], of the frames after the context.
        sample_rate: Samples per second.
    """

    true: Tensor
    generated: Tensor
    sample_rate: int

    @property
    def future(self) -> Tensor:
        """The true sound after the context, float[B, H, channels, n]."""
        return self.true[:, self.true.shape[1] - self.generated.shape[1] :]

    @property
    def fps(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.true.shape[-1]


def mel_curves(sound: Sound) -> dict[str, list[float]]:
    """Compute the mel distance to the true sound against the horizon.

    Returns:
        ``mel``: mean absolute difference in dB of the mel bands (`owl.nn.spectrum.mel_decibels`) in frame 1, 2, ...
        after the context, over clips; and, for several clips, ``other_mel``: the same of the true sound of another
        clip, as a reference.
    """
    true, generated = (mel_decibels(joined(x), sound.sample_rate) for x in (sound.future, sound.generated))
    curves = {"mel": generated}
    if len(sound.true) > 1:
        curves["other_mel"] = true.roll(1, 0)
    frames, samples = sound.generated.shape[1], sound.generated.shape[-1]
    return {name: over_frames((found - true).abs().mean((0, 1, 2)), frames, samples) for name, found in curves.items()}


def over_frames(values: Tensor, frames: int, samples: int) -> list[float]:
    """Average a value of each column of a mel spectrogram, float[columns], over the columns of each frame."""
    return [float(values[columns].mean()) for columns in columns_of(frames, samples)]


def columns_of(frames: int, samples: float, together: int = 1) -> list[slice]:
    """Return the columns of a mel spectrogram for each of a number of frames.

    Args:
        frames: Number of frames.
        samples: Samples per frame.
        together: Frames whose columns are taken, the frame and those after it.
    """
    return [slice(int(h * samples / MEL_HOP), ceil((h + together) * samples / MEL_HOP)) for h in range(frames)]


def onset_agreement(sound: Sound, buttons: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Measure whether a shot sounds like a shot: whether sound starts when ATTACK is pressed, more than otherwise.

    The strength of an onset is the largest rise of the mel bands, in dB averaged over bands and channels, within 0.2
    seconds. The agreement is the area under the ROC curve: the probability that the onset after a press is stronger
    than that at a frame far from any press. 0.5: independent of ATTACK; true sound is below 1, since others shoot too.

    Args:
        sound: The sound.
        buttons: float[B, context + H, number of buttons].
        names: Names of the buttons.

    Returns:
        ``onset_agreement`` and ``onset_agreement_true`` of the true sound, and the number of ``shots``. Empty without a
        button ATTACK, without a press, or without a frame far from any.
    """
    if ATTACK not in names:
        return {}
    pressed = buttons[..., list(names).index(ATTACK)] > 0.5
    frames, context = sound.generated.shape[1], sound.true.shape[1] - sound.generated.shape[1]
    listened = max(1, ceil(LISTENED * sound.fps))
    before = torch.nn.functional.pad(pressed, (1, 0))[:, :-1]
    shots = (pressed & ~before)[:, context:]
    near = torch.nn.functional.max_pool1d(pressed[:, None].float(), 2 * listened + 1, 1, listened)[:, 0] > 0
    quiet = ~near[:, context:]
    if context == 0:
        shots[:, 0] = False  # the state before the first frame is unknown
    if not (shots.any() and quiet.any()):
        return {}
    agreement = {}
    for suffix, found in (("", sound.generated), ("_true", sound.future)):
        strength = onset_strength(joined(found), sound.sample_rate, frames, listened)
        agreement[f"onset_agreement{suffix}"] = area_under_roc(strength[shots], strength[quiet])
    return agreement | {"shots": float(shots.sum())}


def onset_strength(sound: Tensor, sample_rate: int, frames: int, listened: int) -> Tensor:
    """Compute the strength of the strongest onset in each frame and those after it.

    Args:
        sound: float[B, channels, frames * n].
        sample_rate: Samples per second.
        frames: Number of frames.
        listened: Frames in which an onset counts, including the first.

    Returns:
        float[B, frames], in dB.
    """
    levels = mel_decibels(sound, sample_rate)
    rise = levels.diff(dim=-1, prepend=levels[..., :1]).clamp(min=0).mean((1, 2))
    spans = columns_of(frames, sound.shape[-1] / frames, listened)
    return torch.stack([rise[:, columns].amax(1) for columns in spans], 1)


def area_under_roc(positive: Tensor, negative: Tensor) -> float:
    """Compute the probability that a value of float[P] is larger than one of float[N]; equal ones count half."""
    pairs = positive[:, None] - negative[None]
    return float((pairs > 0).double().mean() + (pairs == 0).double().mean() / 2)
