"""What recipes of decoders start from: a tiny autoencoder in a file, and an experiment that decodes its latents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from owl import models
from owl.models.audio_autoencoder import AudioAutoencoder
from owl.models.image_autoencoder import ImageAutoencoder
from owl.recipes.denoising import Draws
from tests.helpers.tiny import tiny_experiment

ENCODER = "owl.callbacks.frozen_encoder.FrozenEncoder"


def save_autoencoder(
    folder: str | Path,
    size: tuple[int, int] = (32, 48),
    latent_size: tuple[int, int] = (4, 6),
    latent_channels: int = 4,
    seed: int = 0,
) -> Path:
    """Export an untrained ImageAutoencoder of 8 pixels a position and 16 channels, in place of a checkpoint.

    Its decoder is not blank: pictures come out with about the variance of pictures.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models.save(ImageAutoencoder(3, size, latent_size, latent_channels, [16, 16, 16], [1, 1, 1]), folder)
    return Path(folder)


def save_audio_autoencoder(folder: str | Path, seed: int = 0, **options: Any) -> Path:
    """Export an untrained AudioAutoencoder of 12 latents a frame of the tests' footage, in place of a checkpoint."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape: dict[str, Any] = {"strides": [3, 5, 7], "widths": [4, 8, 8, 8], "latent_channels": 4}
        models.save(AudioAutoencoder(**shape | options), folder)
    return Path(folder)


def tiny_decoder(
    dataset: str | Path,
    autoencoder: str | Path,
    class_path: str,
    modalities: Sequence[str] = ("rgb",),
    length: int = 1,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return the configuration of a decoder's recipe on pictures of 32x48, which trains in seconds.

    Args:
        dataset: Of tests/helpers/shards.py.
        autoencoder: As ``save_autoencoder`` writes it; named once, and referred to by the callback.
        class_path: Of the recipe, whose argument is ``autoencoder``.
        modalities: Of a sample; with "latent" among them nothing is encoded in training.
        length: Frames of a sample.
        trainer: Settings.
        options: Other arguments of the recipe.
    """
    callbacks = [{"class_path": ENCODER, "init_args": {"path": "${model.init_args.autoencoder}"}}]
    experiment = tiny_experiment(Path(dataset), callbacks=callbacks, **trainer or {})
    experiment["model"] = {"class_path": class_path, "init_args": {"autoencoder": str(autoencoder), **options}}
    experiment["data"]["init_args"] |= {"modalities": list(modalities), "length": length}
    return experiment


def tiny_gan_decoder(dataset: str | Path, autoencoder: str | Path, **options: Any) -> dict[str, Any]:
    """Return the configuration of a GANDecoder, as ``tiny_decoder``, with a penalty at every second step."""
    discriminator = {
        "class_path": "owl.models.discriminators.ResNetDiscriminator",
        "init_args": {"widths": [8, 16], "blocks": [1, 1], "group_size": 8, "frames": options.pop("frames", 1)},
    }
    return tiny_decoder(
        dataset,
        autoencoder,
        "owl.recipes.gan_decoder.GANDecoder",
        **{
            "discriminator": discriminator,
            "weights": {"l1": 1.0, "lpips": 0.0, "adversarial": 0.1},
            "adversarial_start": 1,
            "adversarial_ramp": 4,
            "penalty_every": 2,
            "beta2": [0.9, 0.99],
            "warmup_steps": 2,
        }
        | options,
    )


def drawn(recipe: Any, batch: dict[str, Tensor]) -> Draws:
    """Return what a DiffusionDecoder draws for a batch in its first step."""
    draws: Draws = recipe.chances.draw(batch, 0, recipe.network.target, recipe.device)
    return draws
