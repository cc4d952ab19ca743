"""Clips of latents and controls as inputs of a world model, and the noise for them."""

import math

import torch
from torch import Tensor

from owl.errors import OwlError
from owl.flow_matching import each
from owl.models.world_model import Controls, Streams, WorldTransformer


def clip_inputs(network: WorldTransformer, batch: dict[str, Tensor]) -> tuple[Streams, Controls, Tensor | None]:
    """Return standardised latents, controls, and the documents of packed clips (int64[B, F], ``NEVER``: padding).

    Args:
        network: The world model, whose statistics standardise the latents.
        batch: A latent float[B, F, ...] of every stream by its modality, ``buttons`` float[B, F, number of buttons],
            ``axes`` float[B, F, number of axes] and, of packed clips, ``document``.

    Raises:
        OwlError: The batch lacks a modality that the network needs.
    """
    needed = {modality: modality for modality in network.latent_modalities.values()} | {"controls": "buttons"}
    missing = [modality for modality, tensor in needed.items() if tensor not in batch]
    if missing:
        raise OwlError(
            "recipe.dataset",
            f"samples hold no {' and no '.join(missing)}, the world model needs {', '.join(needed)}; set "
            f"data.init_args.modalities to [{', '.join(needed)}]",
        )
    latents = network.standardize({name: batch[key] for name, key in network.latent_modalities.items()})
    given = {name: latents.pop(name) for name in network.given}
    return latents, Controls(batch["buttons"], batch["axes"], given=given), batch.get("document")


def unpacked_inputs(network: WorldTransformer, batch: dict[str, Tensor], length: int) -> tuple[Streams, Controls]:
    """Return standardised latents and controls of clips that each come from one episode.

    Args:
        network: See `clip_inputs`.
        batch: See `clip_inputs`.
        length: Number of frames that a clip needs.

    Raises:
        OwlError: The clips are packed or too short, or the batch lacks a modality.
    """
    latents, controls, document = clip_inputs(network, batch)
    found = controls.buttons.shape[1]
    if document is not None or found < length:
        actual = f"{found} frames long" if document is None else "packed from several episodes"
        raise OwlError(
            "recipe.dataset",
            f"clips are {actual}, expected {length} frames of one episode; set data.init_args.length to at least "
            f"{length} and data.init_args.pack to false",
        )
    return latents, controls


def flat(streams: Streams) -> Tensor:
    """Flatten and join the streams of each frame: float[B, F, features]."""
    return torch.cat([x.flatten(2) for x in streams.values()], 2)


def unflat(x: Tensor, network: WorldTransformer) -> Streams:
    """Undo `flat` for the generated streams of a world model."""
    shapes = {name: stream.shape for name, stream in network.generated.items()}
    parts = x.split([math.prod(shape) for shape in shapes.values()], 2)
    return {name: part.unflatten(2, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def draw(generators: list[torch.Generator], like: Streams) -> Streams:
    """Draw normal noise for each sample from its generator, shaped like ``like``."""
    return {name: each(torch.randn, generators, *x.shape[1:]) for name, x in like.items()}
