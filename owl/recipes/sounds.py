"""Sound of a batch, checked, and made audible."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from owl.errors import OwlError
from owl.latents import datasets
from owl.metrics.audio import SILENCE
from owl.nn.spectrum import mel_decibels
from owl.recipes.images import form
from owl.viz.spectrograms import spectrograms

PLAYED = 4
"""Sounds of a batch that are played."""


def sounds(batch: dict[str, Tensor]) -> Tensor:
    """Return the sound of a batch.

    Args:
        batch: ``audio``: float32[B, C, n] in [-1, 1].

    Raises:
        OwlError: The batch has no sound, or in another form.
    """
    audio = batch.get("audio")
    if audio is None or audio.ndim != 3 or audio.dtype != torch.float32:
        raise OwlError(
            "recipe.dataset",
            f"audio of a batch is {form(audio)}, expected float32[B, C, samples]; set data.init_args.modalities to "
            "[audio] (recordings store it with `--audio true`), or change your data module",
        )
    return audio


def draw_segments(audio: Tensor, samples: int, count: int) -> Tensor:
    """Draw segments of a batch of sounds for training, loud ones more often: games are silent most of the time.

    Each segment is drawn at most once, with a probability proportional to its root mean square plus that of silence.

    Args:
        audio: float[B, C, n].
        samples: Length of a segment; each sound has n // samples of them.
        count: Number of segments.

    Returns:
        float[count, C, samples].

    Raises:
        OwlError: The batch has fewer segments.
    """
    batch, _, length = audio.shape
    each = length // samples
    if batch * each < count:
        raise OwlError(
            "recipe.arguments",
            f"segments is {count}, but the batch has {batch * each} of {samples} samples ({batch} sounds of {length} "
            "samples); set data.init_args.length or batch_size to more, or model.init_args.segments to fewer",
        )
    pieces = audio[..., : each * samples].unflatten(2, (each, samples)).transpose(1, 2).flatten(0, 1)
    level = pieces.float().square().mean((1, 2)).sqrt()
    return pieces[torch.multinomial(level + SILENCE, count)]


def check_sample_rate(data: Any, sample_rate: int) -> None:
    """Check that the sound of a data module has the sample rate of a network.

    Args:
        data: `owl.data.datamodule.ShardDataModule` or another data module; one whose datasets have no description (see
            `owl.latents.described`) is not checked.
        sample_rate: Samples per second.

    Raises:
        OwlError: It has another one.
    """
    for dataset in datasets(data):
        path = getattr(dataset, "path", type(dataset).__qualname__)
        description = getattr(getattr(dataset, "info", None), "modalities", {}).get("audio", {})
        if description.get("sample_rate", sample_rate) != sample_rate:
            raise OwlError(
                "recipe.dataset",
                f"audio of {path} has {description['sample_rate']} samples per second, the "
                f"network expects {sample_rate}; set sample_rate of model.init_args.network, or use another dataset",
            )


def listen(versions: dict[str, Tensor], sample_rate: int) -> dict[str, np.ndarray]:
    """Prepare versions of the same sounds for a recipe's ``media``: the loudest `PLAYED` of a batch, one after another.

    Args:
        versions: float[B, C, n] by name; the first are the originals.
        sample_rate: Samples per second.

    Returns:
        ``sound_<name>``, float32[C, samples], and ``spectrograms``, uint8[H, W, 3], each version below the first.
    """
    original = next(iter(versions.values()))
    loudest = original.square().mean((1, 2)).argsort(descending=True)[:PLAYED].sort().values
    played = {
        name: torch.cat([*sound[loudest].detach().float().clamp(-1, 1)], -1).cpu() for name, sound in versions.items()
    }
    levels = {name: mel_decibels(sound.mean(0), sample_rate) for name, sound in played.items()}
    seconds = next(iter(played.values())).shape[-1] / sample_rate
    return {f"sound_{name}": sound.numpy() for name, sound in played.items()} | {
        "spectrograms": spectrograms(levels, seconds, sample_rate)
    }
