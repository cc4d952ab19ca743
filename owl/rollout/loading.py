"""World models and the decoders of their streams, from files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from torch import nn

from owl import models
from owl.data.shards import DatasetInfo
from owl.errors import OwlError
from owl.models.world_model import WorldTransformer
from owl.rollout.checks import check_decoder
from owl.rollout.shared import PARTS, SharedWorld

PROVENANCE = "provenance.yaml"

Forcing = Literal["teacher", "diffusion", "full"]
"""How the recipe `owl.recipes.world_model.WorldModel` presents clips."""


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


def trained_stride(content: dict[str, Any]) -> int:
    """Return the data stride of the content of a checkpoint; 1 if it is not stored."""
    return int(_arguments(content, "data").get("stride", 1))


def origin_of(path: str | Path, content: dict[str, Any] | None) -> dict[str, Any]:
    """Return what is known about the training of the network of a checkpoint or an export.

    Args:
        path: The checkpoint or export.
        content: Content of the checkpoint; None for an export, whose provenance.yaml is read.

    Returns:
        ``checkpoint``, ``global_step``, ``recipe``, ``code_version``, ``dataset``, ``stride`` and ``length`` of the
        clips and, of a world model, ``forcing``, of an inverse dynamics model, ``dead_zone``, as far as they are known.

    Raises:
        OwlError: provenance.yaml is damaged.
    """
    if content is not None:
        model, data = _arguments(content, "model"), _arguments(content, "data")
        resolved = content.get("hyper_parameters") or {}  # of a recipe that found out how its teacher was trained
        return {
            "checkpoint": str(path),
            "global_step": content.get("global_step"),
            **{key: content["owl"].get(key) for key in ("recipe", "code_version", "dataset")},
            "stride": trained_stride(content),
            **{key: data[key] for key in ("length",) if key in data},
            **{key: resolved[key] for key in ("forcing",) if key in resolved},
            **{key: model[key] for key in ("dead_zone",) if key in model},
        }
    file = Path(path) / PROVENANCE
    if not file.is_file():
        return {}
    try:
        return dict(yaml.safe_load(file.read_text("utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise OwlError(
            "export.config", f"{file} does not describe the origin of a network ({reason}); export the checkpoint again"
        ) from error


def _arguments(content: dict[str, Any], part: str) -> dict[str, Any]:
    """Return the arguments of "model" or "data" in the configuration of a checkpoint."""
    return ((content["owl"].get("config") or {}).get(part) or {}).get("init_args") or {}


@dataclass(frozen=True)
class Source:
    """A trained world model.

    Attributes:
        path: Its checkpoint or export.
        network: The world model, on the CPU, in training mode.
        forcing: How it was trained; None if the file does not state it, as that of a few-step student.
        stride: Stored frames from one of its frames to the next; None likewise.
        length: Frames of the clips that it was trained on; None likewise.
    """

    path: str
    network: WorldTransformer
    forcing: Forcing | None
    stride: int | None
    length: int | None


def load_source(path: str, checkpoint: bool = False) -> Source:
    """Load a world model with averaged weights.

    Args:
        path: A .ckpt file written by fit, or a folder written by export.
        checkpoint: Whether it recomputes activations in the backward pass.

    Raises:
        OwlError: The file is missing or damaged, or contains another kind of network.
    """
    network, content = load_world_model(path, "network")
    network.train()
    network.checkpoint = checkpoint
    origin = origin_of(path, content)
    forcing = origin.get("forcing")
    return Source(
        path,
        network,
        forcing if forcing in get_args(Forcing) else None,
        origin.get("stride"),
        origin.get("length"),
    )


def check_causal(source: Source, role: str) -> None:
    """Check that a world model was not trained with bidirectional attention.

    Raises:
        OwlError: It was.
    """
    if source.forcing == "full":
        raise OwlError(
            "recipe.teacher",
            f"the {role} {source.path} was trained with forcing full, in which frames attend to later ones, expected "
            "teacher or diffusion; give a causal world model",
        )


@dataclass(frozen=True)
class Parts:
    """What belongs to a world model, as far as its file names it.

    Attributes:
        data: Dataset of latents.
        stride: Stored frames of the dataset from one frame of the world model to the next; 1 if it is not stored.
        decoders: Decoders of the video.
        others: Paths of `owl.rollout.shared.PARTS`; None: there is none.
    """

    data: str | None = None
    stride: int = 1
    decoders: tuple[str, ...] = ()
    others: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(PARTS))


def parts_of(path: str | Path, content: dict[str, Any] | None) -> Parts:
    """Return what belongs to a world model.

    Args:
        path: Its checkpoint or export.
        content: Content of the checkpoint; None for an export. That of a shared world has all parts.

    Raises:
        OwlError: The export is damaged.
    """
    stride = int(origin_of(path, content).get("stride", 1))
    if content is not None:
        return Parts(_arguments(content, "data").get("path"), stride)
    world = SharedWorld.find(path)
    if world is None:
        return Parts(stride=stride)
    return Parts(
        world.scenes, stride, tuple(map(world.decoder, world.decoders)), {name: world.part(name) for name in PARTS}
    )


def need_data(data: str | None, path: str | Path) -> str:
    """Return the dataset of a world model after checking that there is one.

    Raises:
        OwlError: There is none.
    """
    if not data:
        raise OwlError(
            "world.data", f"{path} does not name the dataset of its latents, expected one; give the folder with --data"
        )
    return data


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
            f"{modality} of {url} was encoded with {path}, which does not exist; give that autoencoder's checkpoint "
            f"or export with {option}",
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
