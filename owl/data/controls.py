"""Controls of a dataset against those of a network."""

from collections.abc import Mapping
from typing import Any

from owl.errors import OwlError


def check_controls(
    modalities: Mapping[str, Mapping[str, Any]], url: str, buttons: list[str], axes: list[str], advice: str
) -> None:
    """Refuse a dataset whose controls are not those of a network, in the same order.

    Args:
        modalities: Of the dataset's description; without "controls" it has neither buttons nor axes.
        url: The dataset, for the message.
        buttons: Names of the network's buttons.
        axes: Names of its axes.
        advice: What to do about it, the end of the message; ``{kind}`` in it becomes "buttons" or "axes".

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
