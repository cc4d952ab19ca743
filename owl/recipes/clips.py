"""Clips of latents and controls, shared by recipes of world models."""

import torch
from torch import Tensor

from owl.errors import OwlError
from owl.models.world_model import Controls, Streams, WorldTransformer
from owl.recipes.randomness import each


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
            f"data.modalities to [{', '.join(needed)}]",
        )
    latents = network.standardize({name: batch[key] for name, key in network.latent_modalities.items()})
    given = {name: latents.pop(name) for name in network.given}
    return latents, Controls(batch["buttons"], batch["axes"], given=given), batch.get("document")


def draw(generators: list[torch.Generator], like: Streams) -> Streams:
    """Draw normal noise for each sample from its generator, shaped like ``like``."""
    return {name: each(torch.randn, generators, *x.shape[1:]) for name, x in like.items()}
