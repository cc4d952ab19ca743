"""Arguments of recipes: checks, and how checkpoints store them."""

import inspect
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import nn

from owl import models
from owl.errors import OwlError


def store_arguments(recipe: LightningModule, logger: bool = True, ignore: Iterable[str] = ()) -> None:
    """Store the arguments of a recipe's constructor, which calls this, in its checkpoints.

    Those of the command line are stored as configured. Those given in Python are stored in the same form: a network
    with a ``config`` by its class and arguments, a dataclass by its fields. Other objects, such as functions that build
    optimisers, are left out, since checkpoints contain plain values only: pass them to ``load_from_checkpoint`` again.

    Args:
        recipe: The recipe.
        logger: Whether the logger records them as well.
        ignore: Names of arguments that are not stored.
    """
    described: list[dict[str, Any]] = []
    frame = inspect.currentframe()
    if _given_hyperparameters.get() is None and frame is not None:  # in Python
        described.append({"_instantiator": "lightning.pytorch.cli.instantiate_module"})
        for arguments in collect_init_args(frame, [], classes=(LightningModule,)):
            for name, value in arguments.items():
                with suppress(TypeError):
                    described[0][name] = plain(value)
    recipe.save_hyperparameters(*described, logger=logger, ignore=list(ignore))


def plain(value: Any) -> Any:
    """Return an argument as a configuration would contain it.

    Raises:
        TypeError: It is or contains an object that cannot be described.
    """
    if isinstance(value, nn.Module):
        value = models.describe(value) or value
    elif is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    if type(value) in (bool, int, float, str, NoneType):
        return value
    raise TypeError(f"{type(value).__name__} is no plain value")


def fractions(**values: float) -> None:
    """Check shares and probabilities.

    Args:
        values: By name of the recipe's argument.

    Raises:
        OwlError: A number is not in [0, 1].
    """
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise OwlError(
                "recipe.arguments",
                f"{name} is {value}, expected a number from 0 to 1; correct model.init_args.{name}",
            )


def not_negative(**values: float) -> None:
    """Check strengths.

    Args:
        values: By name of the recipe's argument.

    Raises:
        OwlError: A number is negative.
    """
    for name, value in values.items():
        if not value >= 0:  # nor NaN
            raise OwlError(
                "recipe.arguments", f"{name} is {value}, expected at least 0; correct model.init_args.{name}"
            )


def any_weight(weights: Any) -> None:
    """Check that a loss has a term.

    Args:
        weights: A dataclass of weights.

    Raises:
        OwlError: Every weight is 0.
    """
    if not any(asdict(weights).values()):
        raise OwlError(
            "recipe.weights",
            "every weight of the loss is 0, expected at least one above 0; set one in model.init_args.weights",
        )
