"""World models and the decoders of their streams, from files."""

from pathlib import Path
from typing import Any

from torch import nn

from owl import models
from owl.data.shards import DatasetInfo
from owl.errors import OwlError
from owl.models.world_model import WorldTransformer
from owl.rollout.checks import check_decoder


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


def named_decoder(info: DatasetInfo, url: str, modality: str = "latent", option: str = "--decoder") -> str:
    """Return the path of the checkpoint with which latents of a dataset were encoded.

    Args:
        info: Description of the dataset.
        url: The dataset, for the message.
        modality: The latents.
        option: Option for the path, for the message.

    Raises:
        OwlError: The checkpoint does not exist on this machine.
    """
    path = str(info.modalities[modality]["encoder"]["checkpoint"])
    if not Path(path).exists():
        raise OwlError(
            "decoder.missing",
            f"{modality} of {url} was encoded with {path}, which is not here; give that autoencoder's checkpoint or "
            f"export with {option}",
        )
    return path


def other_decoder(
    network: WorldTransformer, name: str, info: DatasetInfo, url: str, path: str | None
) -> nn.Module | None:
    """Load the decoder of a generated stream other than the video.

    Args:
        network: The world model.
        name: The stream.
        info: Description of the dataset, which names the autoencoder if there is no path.
        url: The dataset, for the message.
        path: Run folder, checkpoint or export, or None.

    Returns:
        The decoder; None if the world model does not generate the stream.

    Raises:
        OwlError: The world model does not generate the stream although a path was given, the file is missing, or it
            holds a decoder of other latents.
    """
    if name not in network.generated and path is None:
        return None
    if path is None:
        path = named_decoder(info, url, network.latent_modalities[name], f"--{name}_decoder")
    decoder = models.load(models.find_checkpoint(path))
    check_decoder(network, name, decoder)
    return decoder
