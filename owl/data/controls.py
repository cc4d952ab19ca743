"""Comparison of the controls of a dataset with those of a network."""

from collections.abc import Mapping
from typing import Any

from owl.errors import OwlError


def check_controls(
    modalities: Mapping[str, Mapping[str, Any]], url: str, buttons: list[str], axes: list[str], advice: str
) -> None:
    """Check that a dataset has the controls of a network, in the same order.

    Args:
        modalities: Modalities in the dataset's description; without "controls" there are no buttons and no axes.
        url: URL of the dataset, for the message.
        buttons: Names of the network's buttons.
        axes: Names of its axes.
        advice: End of the message, how to fix it; ``{kind}`` in it is replaced by "buttons" or "axes".

    Raises:
        OwlError: They differ.
    """
    controls = modalities.get("controls", {"buttons": [], "axes": []})
    for kind, expected in (("buttons", buttons), ("axes", axes)):
        if list(controls[kind]) != expected:
            raise OwlError(
                "dataset.controls",
                f"{url} has the {kind} {', '.join(controls[kind]) or 'none'}, the network has "
                f"{', '.join(expected) or 'none'}; {advice.format(kind=kind)}",
            )
