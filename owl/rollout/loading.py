"""World models of checkpoints and exports."""

from pathlib import Path
from typing import Any

from owl import models
from owl.errors import OwlError
from owl.models.world_model import WorldTransformer


def load_world_model(path: str | Path, name: str | None = None) -> tuple[WorldTransformer, dict[str, Any] | None]:
    """Load a world model and the content of its checkpoint, None for an export; arguments as `owl.models.load`.

    Raises:
        OwlError: The file is missing or damaged, or contains a different kind of network.
    """
    network, content = models.load_with_content(path, name)
    if not isinstance(network, WorldTransformer):
        raise OwlError(
            "network.kind",
            f"{path} holds a {type(network).__qualname__}, expected a world model; give a checkpoint of the recipe "
            "owl.recipes.world_model.WorldModel or its export",
        )
    return network, content


def trained_stride(content: dict[str, Any] | None) -> int:
    """Return the data stride of the content of a checkpoint; 1 if it is not stored, and for an export (None)."""
    if content is None:
        return 1
    data = content["owl"]["config"].get("data") or {}
    return int((data.get("init_args") or {}).get("stride", 1))
