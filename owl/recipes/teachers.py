"""World models that a recipe starts from, checked against each other."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from owl.errors import OwlError
from owl.latents import check_encoder, check_latents, described, encoder_of
from owl.models.world_model import WorldTransformer
from owl.rollout.loading import Forcing, Source


def copied(source: Source, checkpoint: bool) -> Source:
    """Return a copy of a world model with weights of its own, as if it were loaded again.

    Args:
        source: The world model.
        checkpoint: Whether the copy recomputes activations in the backward pass.
    """
    network = deepcopy(source.network)
    network.checkpoint = checkpoint
    return replace(source, network=network)


def check_same(student: Source, other: Source, role: str) -> None:
    """Check that another world model has the latents and controls of the student.

    Raises:
        OwlError: It differs in streams, encoders, latent statistics, controls or stride.
    """
    mine, theirs = student.network, other.network
    differing: list[str] = []
    for kind, found, expected in (
        ("streams", _described(theirs), _described(mine)),
        ("buttons", ", ".join(theirs.buttons), ", ".join(mine.buttons)),
        ("axes", ", ".join(theirs.axes), ", ".join(mine.axes)),
        ("stride", other.stride, student.stride),
    ):
        if found != expected and None not in (found, expected):
            differing.append(f"{kind} ({found or 'none'}, the student: {expected or 'none'})")
    if not differing:
        for name in mine.streams:
            found, expected = encoder_of(theirs, name), encoder_of(mine, name)
            if found != expected:
                differing.append(f"the encoder of {name} ({found}, the student: {expected})")
            elif not all(
                torch.equal(getattr(theirs, f"{name}_{part}"), getattr(mine, f"{name}_{part}"))
                for part in ("mean", "std")
            ):
                differing.append(f"mean and std of {name}")
    if differing:
        raise OwlError(
            "recipe.teacher",
            f"the {role} {other.path} differs from the student {student.path} in {'; '.join(differing)}; give world "
            "models that were trained on the same latents and controls",
        )


def forcing_of(teacher: Source, given: Forcing | None) -> Forcing:
    """Return how a teacher was trained, from its checkpoint or from the recipe's argument ``forcing``.

    Raises:
        OwlError: Neither states it, or they disagree.
    """
    stored, path = teacher.forcing, teacher.path
    if stored is None and given is None:
        raise OwlError(
            "recipe.teacher",
            f"the teacher {path} does not state how it was trained, expected model.init_args.forcing to do so; set it "
            "to teacher, diffusion or full",
        )
    if stored is not None and given not in (None, stored):
        raise OwlError(
            "recipe.teacher",
            f"forcing is {given}, the teacher {path} was trained with {stored}; leave out model.init_args.forcing",
        )
    return stored or given  # type: ignore[return-value]


def check_data(network: WorldTransformer, sources: dict[str, Source], data: Any) -> tuple[dict[str, Any], str]:
    """Check that a dataset has the latents, controls and stride of world models.

    Args:
        network: The one that is trained, to which the others are equal.
        sources: All of them by role.
        data: The data module.

    Returns:
        The dataset's description and path, see `owl.latents.described`.

    Raises:
        OwlError: It does not.
    """
    found = described(data)
    check_latents(network, *found)
    check_encoder(network, *found)
    for role, source in sources.items():
        check_stride(source, getattr(data, "train_dataset", None), role)
    return found


def check_stride(source: Source, dataset: Any, role: str) -> None:
    """Check that a dataset has the stride with which a world model was trained, as far as both are known.

    Raises:
        OwlError: It has another one.
    """
    found = getattr(dataset, "stride", None)
    if None not in (found, source.stride) and found != source.stride:
        raise OwlError(
            "network.stride",
            f"the {role} {source.path} was trained with stride {source.stride}, the dataset has {found}; set "
            f"data.init_args.stride to {source.stride}",
        )


def _described(network: WorldTransformer) -> str:
    """Describe the streams: two networks with the same description have the same latents."""
    return ", ".join(
        f"{name} {stream['shape']} {stream['role']}" + (f" {stream['delay']:g} s earlier" if stream["delay"] else "")
        for name, stream in network.config["streams"].items()
    )
