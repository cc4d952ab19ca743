"""Which latents a network takes or decodes: where datasets keep them, their statistics, the encoder they must be of.

A network that is trained on latents of a frozen encoder says of which in its attributes:

- ``inputs``, a dictionary: the shape of one frame's latent by the name of the input;
- ``latent_modalities``, a dictionary: where datasets keep the latents of an input whose name is not that of the
  modality, such as "latent" for "video";
- for each of them the buffers ``<name>_mean`` and ``<name>_std``, float[channels], and ``<name>_encoder``, uint8[8]:
  the encoder's fingerprint, zeros until `load_latent_stats` has set them.

Buffers go into checkpoints and exports: a decoder proves by them which latents it decodes, without its encoder. An
autoencoder, which carries its encoder, proves it by that.
"""

from typing import Any

import torch
from torch import nn

from owl import models
from owl.data.controls import check_controls
from owl.data.encoder import FrameEncoder
from owl.errors import OwlError

INTERFACE = ("encode", "encoder", "modalities", "latent_channels")
OF_FRAMES, OF_SOUND = ("size", "latent_size"), ("sample_rate", "hop")
"""What a network has that encodes datasets (`owl.data.encoder.FrameEncoder`)."""

UNKNOWN = bytes(8).hex()
"""The fingerprint in a network that no dataset of latents was shown to."""


def described(data: Any) -> tuple[dict[str, dict[str, Any]], str]:
    """What a data module's dataset says of its modalities, and its path.

    Args:
        data: `owl.data.datamodule.ShardDataModule` or one of yours, whose ``train_dataset``, ``validation_dataset`` or
            ``test_dataset`` has ``info.modalities`` (as in dataset.json) and ``path``; None where there is none.

    Raises:
        OwlError: There is none, or it says nothing.
    """
    for name in ("train_dataset", "validation_dataset", "test_dataset"):
        dataset = getattr(data, name, None)
        modalities = getattr(getattr(dataset, "info", None), "modalities", None)
        if modalities is not None:
            return modalities, str(getattr(dataset, "path", type(data).__qualname__))
    found = "loaders without a data module" if data is None else f"the data module {type(data).__qualname__}"
    raise OwlError(
        "recipe.data-module",
        f"a recipe that trains on latents got {found}, from which it cannot learn their mean, std and encoder; use "
        "owl.data.datamodule.ShardDataModule, or give yours a train_dataset with info.modalities as in dataset.json",
    )


class LoadedEncoder(FrameEncoder):
    """An encoder that other processes load again, since not every network can be pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return load_encoder, (self.checkpoint,)


def load_encoder(path: str) -> LoadedEncoder:
    """Load an autoencoder that is to encode.

    Args:
        path: A .ckpt file that fit wrote, or a folder that export wrote.

    Raises:
        OwlError: The file is missing or damaged, or holds a network of another kind.
    """
    network = models.load(path)
    name = type(network).__qualname__
    for attribute in (*INTERFACE, *(OF_SOUND if "audio" in getattr(network, "modalities", ()) else OF_FRAMES)):
        if not hasattr(network, attribute):
            raise OwlError(
                "network.kind",
                f"the network of {path} is {name}, which has no {attribute}, an autoencoder that declares what it "
                "encodes was expected; give the checkpoint of one",
            )
    return LoadedEncoder(
        network=network,
        fingerprint=models.fingerprint(network.encoder),  # type: ignore[arg-type]
        class_path=f"{type(network).__module__}.{name}",
        checkpoint=path,
    )


def load_latent_stats(network: nn.Module, modalities: dict[str, dict[str, Any]], url: str) -> None:
    """Give the network a dataset's latent statistics and encoders.

    Raises:
        OwlError: The dataset's latents have another shape, or its controls other names.
    """
    for name, shape in _inputs(network).items():
        modality = modality_of(network, name)
        description = modalities.get(modality)
        if description is None:
            raise OwlError(
                "dataset.modalities",
                f"{url} has no {modality}, the network's {name} input needs it; make a dataset of latents with "
                "`python -m owl data encode`, or encode in training with owl.callbacks.frozen_encoder.FrozenEncoder",
            )
        if tuple(description["shape"]) != shape:
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
                f"{int(std.argmin())}, one above 0 was expected: an encoder's channels must say something; use another "
                "encoder",
            )
        getattr(network, f"{name}_mean").copy_(torch.tensor(description["mean"]))
        getattr(network, f"{name}_std").copy_(std)
        digits = bytes.fromhex(description["encoder"]["fingerprint"])
        getattr(network, f"{name}_encoder").copy_(torch.tensor(list(digits), dtype=torch.uint8))
    if hasattr(network, "buttons"):
        advice = "set the network's {kind} to those of the dataset and train anew"
        check_controls(modalities, url, network.buttons, network.axes, advice)  # type: ignore[arg-type]


def check_encoder(network: nn.Module, modalities: dict[str, dict[str, Any]], url: str) -> None:
    """Refuse latents of another encoder than the one the network was trained on.

    Raises:
        OwlError: They are.
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


def check_decoder(network: nn.Module, name: str, decoder: nn.Module) -> None:
    """Refuse a decoder of other latents than a network generates.

    Args:
        network: Trained on latents, such as a world model.
        name: Of its input whose latents are to be decoded.
        decoder: With ``decode`` and either its ``encoder`` or the buffer that names it, such as ``latent_encoder``.

    Raises:
        OwlError: It is one, or does not say what it decodes.
    """
    modality = modality_of(network, name)
    if not (hasattr(decoder, "decode") and tells_encoder(decoder, modality)):
        raise OwlError(
            "decoder.kind",
            f"the {name} decoder is a {type(decoder).__name__}, a network with decode that tells which latents it "
            f"decodes was expected, by its encoder or by a buffer {modality}_encoder; give the autoencoder of the "
            "latents, or a decoder that was trained on them",
        )
    found, expected = encoder_of(decoder, modality), encoder_of(network, name)
    if found != expected or found == UNKNOWN:
        raise OwlError(
            "latents.encoder",
            f"the {name} decoder decodes latents of encoder {found}, the {type(network).__name__} was trained on "
            f"latents of encoder {expected}; give the autoencoder that encoded its dataset, or a decoder trained on it",
        )


def tells_encoder(network: nn.Module, name: str = "latent") -> bool:
    """Whether a network says of which encoder the latents of an input are."""
    return any(hasattr(network, attribute) for attribute in (f"{name}_encoder", "encoder"))


def encoder_of(network: nn.Module, name: str = "latent") -> str:
    """Fingerprint of the encoder whose latents a network takes, generates or decodes.

    Args:
        network: One that `tells_encoder`.
        name: Of the network's input.
    """
    if hasattr(network, f"{name}_encoder"):
        return bytes(getattr(network, f"{name}_encoder").tolist()).hex()
    return models.fingerprint(network.encoder)  # type: ignore[arg-type]


def modality_of(network: nn.Module, name: str) -> str:
    """Where datasets keep the latents of one of a network's inputs."""
    names: dict[str, str] = getattr(network, "latent_modalities", {})
    return names.get(name, name)


def _inputs(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return network.inputs  # type: ignore[return-value]
