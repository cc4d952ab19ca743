"""Latents of a network: their modalities in datasets, their statistics, and the encoder they must come from.

A network that is trained on latents of a frozen encoder declares them in its attributes:

- ``inputs``, a dictionary: the shape of one frame's latent by the name of the input, or (c,) for tokens of sound;
- ``latent_modalities``, a dictionary: the modality in datasets for inputs with another name, such as "latent" for
  "video";
- for each of them the buffers ``<name>_mean`` and ``<name>_std``, float[channels], and ``<name>_encoder``, uint8[8]:
  the encoder's fingerprint, zeros until `load_latent_stats` has set them.

Buffers are stored in checkpoints and exports: they identify the latents that a decoder takes, without its encoder. An
autoencoder is identified by its encoder. An encoder that imitates another one (`owl.models.image_encoder`) stores the
other's fingerprint in such a buffer: its latents are meant for the same networks.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from owl import models
from owl.data.controls import check_controls
from owl.data.encoder import FrameEncoder
from owl.data.modalities import MODALITIES
from owl.errors import OwlError

INTERFACE = ("encode", "encoder", "modalities", "latent_channels")
OF_FRAMES, OF_SOUND = ("size", "latent_size"), ("sample_rate", "hop")
"""Attributes of a network that can encode datasets (`owl.data.encoder.FrameEncoder`)."""

UNKNOWN = bytes(8).hex()
"""The fingerprint before `load_latent_stats` was called."""


def datasets(data: Any) -> Iterator[Any]:
    """Yield the datasets of a data module, those of training, validation and test, as far as it has them."""
    for name in ("train_dataset", "validation_dataset", "test_dataset"):
        dataset = getattr(data, name, None)
        if dataset is not None:
            yield dataset


def described(data: Any) -> tuple[dict[str, dict[str, Any]], str]:
    """Return the description of the modalities of a data module's dataset, as its windows contain them, and its path.

    Args:
        data: `owl.data.datamodule.ShardDataModule` or another data module whose ``train_dataset``,
            ``validation_dataset`` or ``test_dataset`` has ``info.modalities`` (as in dataset.json) and ``path``; None
            where there is none.

    Raises:
        OwlError: There is no data module, or its dataset has no description.
    """
    for dataset in datasets(data):
        modalities = getattr(getattr(dataset, "info", None), "modalities", None)
        if modalities is not None:
            stride = getattr(dataset, "stride", 1)
            return in_windows(modalities, stride), str(getattr(dataset, "path", type(data).__qualname__))
    found = "loaders without a data module" if data is None else f"the data module {type(data).__qualname__}"
    raise OwlError(
        "recipe.data-module",
        f"a recipe that trains on latents got {found}, without a description of mean, std and encoder; use "
        "owl.data.datamodule.ShardDataModule, or give yours a train_dataset with info.modalities as in dataset.json",
    )


def in_windows(modalities: dict[str, dict[str, Any]], stride: int) -> dict[str, dict[str, Any]]:
    """Return descriptions with the shape of a frame in windows (`owl.data.modalities.base.Modality.in_windows`).

    Args:
        modalities: As in dataset.json.
        stride: Stored frames from one frame of a window to the next.
    """
    return {
        name: MODALITIES[name].in_windows(description, stride) if name in MODALITIES else description
        for name, description in modalities.items()
    }


class LoadedEncoder(FrameEncoder):
    """An encoder that is reloaded in other processes, since not every network can be pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return load_encoder, (self.checkpoint,)


def load_encoder(path: str) -> LoadedEncoder:
    """Load an autoencoder for encoding.

    Args:
        path: A .ckpt file written by fit, or a folder written by export.

    Raises:
        OwlError: The file is missing or damaged, or contains another kind of network.
    """
    network = models.load(path)
    name = type(network).__qualname__
    for attribute in (*INTERFACE, *(OF_SOUND if "audio" in getattr(network, "modalities", ()) else OF_FRAMES)):
        if not hasattr(network, attribute):
            raise OwlError(
                "network.kind",
                f"the network of {path} is {name}, which has no {attribute}, expected an autoencoder that declares "
                "what it encodes; give the checkpoint of one",
            )
    fingerprint, own = encoder_of(network), models.fingerprint(network.encoder)  # type: ignore[arg-type]
    return LoadedEncoder(
        network=network,
        fingerprint=fingerprint,
        class_path=f"{type(network).__module__}.{name}",
        checkpoint=path,
        distilled=None if own == fingerprint else own,
    )


def check_latents(network: nn.Module, modalities: dict[str, dict[str, Any]], url: str) -> None:
    """Check that a dataset has the latents and controls that a network needs.

    Raises:
        OwlError: A latent is missing or constant, or shapes or the names of the controls differ.
    """
    for name, shape in _inputs(network).items():
        modality = modality_of(network, name)
        description = modalities.get(modality)
        if description is None:
            raise OwlError(
                "dataset.modalities",
                f"{url} has no {modality}, the network's {name} input needs it, it holds {', '.join(modalities)}; make "
                "a dataset of latents with `python -m owl data encode`, or encode in training with "
                "owl.callbacks.frozen_encoder.FrozenEncoder",
            )
        found = tuple(description["shape"])
        if len(shape) == 1:  # sound, in any number of tokens per frame
            found = found[-1:]
        elif "rate" in description:
            raise OwlError(
                "latents.shape",
                f"{modality} of {url} has {description['rate']:g} tokens per second, not the same number in every "
                f"frame, the network expects {list(shape)} per frame; make the footage at "
                f"{description['rate'] / shape[0]:g} frames per second, or encode with an encoder whose tokens per "
                "second (sample_rate / hop) are a multiple of the frame rate",
            )
        if found != shape:
            raise OwlError(
                "latents.shape",
                f"{modality} of {url} has shape {description['shape']}, the network expects {list(shape)}; "
                f"change model.init_args.network or encode with the encoder it was made for",
            )
        std = torch.tensor(description["std"])
        if not (std.isfinite() & (std > 0)).all():
            raise OwlError(
                "latents.statistics",
                f"{modality} of {url} has a standard deviation of {float(std.min()):g} in channel "
                f"{int(std.argmin())}, expected more than 0 in every channel; use another "
                "encoder",
            )
    if hasattr(network, "buttons"):
        advice = "set the network's {kind} to those of the dataset and train again"
        check_controls(modalities, url, network.buttons, network.axes, advice)  # type: ignore[arg-type]


def load_latent_stats(network: nn.Module, modalities: dict[str, dict[str, Any]], url: str) -> None:
    """Copy a dataset's latent statistics, encoder fingerprints and delays to the network.

    Raises:
        OwlError: See `check_latents`.
    """
    check_latents(network, modalities, url)
    for name in _inputs(network):
        description = modalities[modality_of(network, name)]
        getattr(network, f"{name}_mean").copy_(torch.tensor(description["mean"]))
        getattr(network, f"{name}_std").copy_(torch.tensor(description["std"]))
        digits = bytes.fromhex(description["encoder"]["fingerprint"])
        getattr(network, f"{name}_encoder").copy_(torch.tensor(list(digits), dtype=torch.uint8))
        if (stream := _streams(network).get(name)) is not None:
            stream["delay"] = description.get("delay", 0.0)


def check_encoder(network: nn.Module, modalities: dict[str, dict[str, Any]], url: str) -> None:
    """Check that latents come from the encoder that the network was trained with, with the same delay.

    Raises:
        OwlError: They come from another encoder, or are of another time relative to their frame.
    """
    for name in _inputs(network):
        modality = modality_of(network, name)
        found, expected = modalities[modality]["encoder"]["fingerprint"], encoder_of(network, name)
        if found != expected:
            raise OwlError(
                "latents.encoder",
                f"{modality} of {url} is of encoder {found}, the {type(network).__name__} was trained on latents of "
                f"encoder {expected}; encode the footage with that encoder, or train a new model under another --name",
            )
        stream = _streams(network).get(name, {})
        trained, delay = (part.get("delay", 0.0) for part in (stream, modalities[modality]))
        if stream and delay != trained:
            raise OwlError(
                "latents.delay",
                f"{modality} of {url} is {delay:g} s earlier than its frame, the {type(network).__name__} was trained "
                f"on latents that are {trained:g} s earlier; encode with --depth_delay {trained:g}, or train a new "
                "model under another --name",
            )


def check_decoder(network: nn.Module, name: str, decoder: nn.Module) -> None:
    """Check that a decoder decodes the latents that a network generates.

    Args:
        network: Network trained on latents, such as a world model.
        name: Name of the input whose latents are decoded.
        decoder: Network with ``decode`` and either its ``encoder`` or the fingerprint buffer, such as
            ``latent_encoder``.

    Raises:
        OwlError: It decodes other latents, or does not identify them.
    """
    modality = modality_of(network, name)
    if not (hasattr(decoder, "decode") and identifies_encoder(decoder, modality)):
        raise OwlError(
            "decoder.kind",
            f"the {name} decoder is a {type(decoder).__name__}, expected a network with decode that identifies "
            f"its latents by its encoder or by a buffer {modality}_encoder; give the autoencoder of the "
            "latents, or a decoder that was trained on them",
        )
    found, expected = encoder_of(decoder, modality), encoder_of(network, name)
    if found != expected or found == UNKNOWN:
        raise OwlError(
            "latents.encoder",
            f"the {name} decoder decodes latents of encoder {found}, the {type(network).__name__} was trained on "
            f"latents of encoder {expected}; give the autoencoder that encoded its dataset, or a decoder trained on it",
        )


def identifies_encoder(network: nn.Module, name: str = "latent") -> bool:
    """Return whether a network identifies the encoder of the latents of an input."""
    return any(hasattr(network, attribute) for attribute in (f"{name}_encoder", "encoder"))


def encoder_of(network: nn.Module, name: str = "latent") -> str:
    """Return the fingerprint of the encoder whose latents a network takes, generates or decodes.

    Args:
        network: Network for which `identifies_encoder` is true.
        name: Name of the network's input.
    """
    stored = bytes(getattr(network, f"{name}_encoder", torch.zeros(8)).to(torch.uint8).tolist()).hex()
    # a network that was trained together with its encoder stores none
    if stored != UNKNOWN or not hasattr(network, "encoder"):
        return stored
    return models.fingerprint(network.encoder)  # type: ignore[arg-type]


def modality_of(network: nn.Module, name: str) -> str:
    """Return the modality in datasets for one of a network's inputs."""
    names: dict[str, str] = getattr(network, "latent_modalities", {})
    return names.get(name, name)


def _streams(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the streams of a world model as its ``config``, which checkpoints and exports store, describes them."""
    return getattr(network, "config", {}).get("streams", {})


def _inputs(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return network.inputs  # type: ignore[return-value]
