"""Post-training of diffusion decoders: losses on whole samples, and consistency distillation to one or two steps."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from owl import models
from owl.errors import OwlError
from owl.flow_matching import consistency_target, noise_levels, random_levels
from owl.models.diffusion_decoder import DiTDecoder
from owl.nn.frozen import freeze
from owl.recipes.randomness import step_generator


def copy_weights(path: str, network: DiTDecoder) -> None:
    """Copy the weights of a trained decoder to one of the same shape.

    Args:
        path: Checkpoint or export.
        network: Gets the weights.

    Raises:
        OwlError: The file is missing or damaged, or contains another network.
    """
    start = models.load(path)
    described, expected = _described(start), _described(network)
    differing = [name for name in expected if described.get(name) != expected[name]]
    if differing:
        raise OwlError(
            "recipe.start",
            f"the network of {path}, a {type(start).__qualname__}, differs from the one to be trained in "
            f"{', '.join(differing)}; give start the checkpoint of a decoder with the same model.init_args.network",
        )
    network.load_state_dict(start.state_dict())


def sampled(network: DiTDecoder, latent: Tensor, base: Tensor | None, noise: Tensor, steps: int, at: int) -> Tensor:
    """Decode latents with gradients through all steps (mode-seeking post-training; FlowMo, Sargent et al. 2025).

    Args:
        network: The decoder. With ``checkpoint``, activations of its blocks are recomputed in the backward pass.
        latent: float[N, c, h, w], not standardised.
        base: The result of `DiTDecoder.estimate`.
        noise: float[N, *target].
        steps: Number of Euler steps, with random spacing. Shortcut models take their own ``steps``, evenly spaced.
        at: Step of training, which determines the spacing, the same on all ranks.

    Returns:
        float[N, 3, H, W].
    """
    spaced = random_levels(steps, step_generator(at, 0, torch.device("cpu")))
    levels = noise_levels(network.steps) if network.shortcut else spaced
    return network.to_image(network.generate(latent, base, noise, levels), base)


def teacher_of(network: DiTDecoder, start: str | None) -> DiTDecoder:
    """Return a frozen copy of a decoder, for consistency distillation.

    Args:
        network: Decoder with the weights of ``start``.
        start: Where they come from; None: nowhere.

    Raises:
        OwlError: The decoder has not been trained, or is a shortcut model.
    """
    if start is None or network.shortcut:
        found = "start is not set" if start is None else "the network is a shortcut model"
        raise OwlError(
            "recipe.arguments",
            f"weights.consistency is above 0 and {found}, expected a trained decoder without shortcut to distil; set "
            "model.init_args.start to its checkpoint",
        )
    teacher = deepcopy(network)
    teacher.base = teacher.proxy = None  # those of the student serve both
    return freeze(teacher)


def consistency_loss(
    student: DiTDecoder,
    teacher: DiTDecoder,
    predicted: Tensor,
    x: Tensor,
    noise_level: Tensor,
    latent: Tensor,
    base: Tensor | None,
    intervals: int,
) -> Tensor:
    """Compute the mean squared error of the student's x0 in consistency distillation.

    Args:
        student: The decoder in training.
        teacher: The decoder whose flow it follows, with guidance if it has any.
        predicted: float[N, *target], the student's x0 at x_t.
        x: float[N, *target], x_t.
        noise_level: float[N], t, as `owl.flow_matching.to_interval` returns it.
        latent: float[N, c, h, w], not standardised.
        base: The result of `DiTDecoder.estimate`.
        intervals: The target is at t - 1 / intervals.

    Returns:
        A scalar.
    """
    target = consistency_target(
        lambda x, t: teacher.guided(x, t, latent, base),
        lambda x, t: student(x, t, latent, base),
        x,
        noise_level,
        (noise_level - 1 / intervals).clamp(min=0),
    )
    return (predicted - target).square().mean()


def _described(network: nn.Module) -> dict[str, Any]:
    """Return the arguments of a network that say what its weights mean."""
    config: dict[str, Any] = network.config  # type: ignore[assignment]
    proxy = config.get("proxy") or {}
    meaning = {name: value for name, value in config.items() if name not in ("steps", "guidance", "checkpoint")}
    return meaning | {"proxy": proxy.get("fingerprint")}
