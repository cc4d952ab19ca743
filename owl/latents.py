"""Which latents a world model takes: where datasets keep them, their statistics, and the encoder they must be of."""

from typing import Any

import torch

from owl.data.controls import check_controls
from owl.errors import OwlError
from owl.models.world_model import WorldTransformer

MODALITIES = {
    "video": "latent",
    "audio": "audio_latent",
    "motion": "motion_latent",
    "conditioning": "conditioning_latent",
}
"""Where the latents of each of the model's inputs lie in a dataset."""


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
        f"WorldModel got {found}, from which it cannot learn its latents' mean, std and encoder; use "
        "owl.data.datamodule.ShardDataModule, or give yours a train_dataset with info.modalities as in dataset.json",
    )


def load_latent_stats(network: WorldTransformer, modalities: dict[str, dict[str, Any]], url: str) -> None:
    """Give the network a dataset's latent statistics and encoders.

    Raises:
        OwlError: The dataset's latents have another shape, or its controls other names.
    """
    for name, shape in network.inputs.items():
        description = modalities.get(MODALITIES[name])
        if description is None:
            raise OwlError(
                "dataset.modalities",
                f"{url} has no {MODALITIES[name]}, the world model's {name} input needs it; "
                "make a dataset of latents with `python -m owl data encode`",
            )
        if tuple(description["shape"]) != shape:
            raise OwlError(
                "latents.shape",
                f"{MODALITIES[name]} of {url} has shape {description['shape']}, the world model expects {list(shape)}; "
                f"change model.init_args.network or encode with the encoder it was made for",
            )
        std = torch.tensor(description["std"])
        if not (std.isfinite() & (std > 0)).all():
            raise OwlError(
                "latents.statistics",
                f"{MODALITIES[name]} of {url} has a standard deviation of {float(std.min()):g} in channel "
                f"{int(std.argmin())}, one above 0 was expected: an encoder's channels must say something; use another "
                "encoder",
            )
        getattr(network, f"{name}_mean").copy_(torch.tensor(description["mean"]))
        getattr(network, f"{name}_std").copy_(std)
        digits = bytes.fromhex(description["encoder"]["fingerprint"])
        getattr(network, f"{name}_encoder").copy_(torch.tensor(list(digits), dtype=torch.uint8))
    advice = "set the network's {kind} to those of the dataset and train anew"
    check_controls(modalities, url, network.buttons, network.axes, advice)


def check_encoder(network: WorldTransformer, modalities: dict[str, dict[str, Any]], url: str) -> None:
    """Refuse latents of another encoder than the one the network was trained on.

    Raises:
        OwlError: They are.
    """
    for name in network.inputs:
        found = modalities[MODALITIES[name]]["encoder"]["fingerprint"]
        expected = encoder_of(network, name)
        if found != expected:
            raise OwlError(
                "latents.encoder",
                f"{MODALITIES[name]} of {url} is of encoder {found}, the world model was trained on latents of encoder "
                f"{expected}; encode the footage with that encoder, or train a new model under another --name",
            )


def encoder_of(network: WorldTransformer, name: str) -> str:
    """Fingerprint of the encoder whose latents one of the network's inputs was trained on."""
    return bytes(getattr(network, f"{name}_encoder").tolist()).hex()
