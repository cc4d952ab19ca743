"""Checks of the arguments of recipes."""

from dataclasses import asdict
from typing import Any

from owl.errors import OwlError


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
