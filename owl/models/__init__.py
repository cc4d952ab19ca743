"""Networks, their exchange format (a folder with ``model.safetensors`` and ``config.yaml``) and their fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from owl.atomic import atomic_write
from owl.errors import OwlError
from owl.trust import check

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
CHECKPOINT_SUFFIX = ".ckpt"


def save(network: nn.Module, directory: str | Path) -> None:
    """Write a network's weights, buffers and constructor arguments, each file atomically.

    Frozen parts, which checkpoints exclude, are also written, so that the export is self-contained.

    Args:
        network: A network that stores its constructor arguments, as plain values, in ``network.config``.
        directory: Local folder; created, files of an earlier export are replaced.

    Raises:
        OwlError: The network has no ``config``.
    """
    import yaml
    from safetensors.torch import save as to_bytes

    if not isinstance(getattr(network, "config", None), dict):
        raise OwlError(
            "network.config",
            f"{type(network).__name__} has no attribute config, expected its constructor arguments as a dict; "
            "set self.config in its __init__",
        )
    class_path = f"{type(network).__module__}.{type(network).__qualname__}"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _whole_state(network).items()}
    text = yaml.safe_dump({"class_path": class_path, "init_args": network.config}, sort_keys=False)
    atomic_write(Path(directory) / WEIGHTS, to_bytes(tensors, metadata={"class_path": class_path}))
    atomic_write(Path(directory) / CONFIG, text)


def load(path: str | Path, name: str | None = None) -> nn.Module:
    """Load a network from a training checkpoint, or from a folder written by ``save`` or ``python -m owl export``.

    Args:
        path: A ``.ckpt`` file written by fit, or a folder with ``model.safetensors`` and ``config.yaml``.
        name: Name of one of the networks that the checkpoint's recipe exports; required if there are several.

    Returns:
        The network on the CPU in eval mode, in the dtype in which it was saved, with the same outputs; from a
        checkpoint with EMA, the averaged weights.

    Raises:
        OwlError: A file is missing or damaged, it names a class that is not trusted (see `owl.trust`) or cannot be
            imported, weights and arguments disagree, or the name is not that of one network.
    """
    return rebuild(path, name)[0] if str(path).endswith(CHECKPOINT_SUFFIX) else _load_export(Path(path))


def exported(recipe: nn.Module) -> dict[str, nn.Module]:
    """Return the networks that a recipe exports, by name.

    A recipe lists the names of submodules in its attribute ``exports``, such as ``("encoder", "decoder")``. These are
    exported and averaged (`owl.callbacks.ema.EMA`); others, such as a critic, are not. A recipe without the attribute
    exports its ``network``, and everything it trains is averaged.

    Raises:
        OwlError: It has no submodule with such a name.
    """
    networks = {}
    for name in getattr(recipe, "exports", ("network",)):
        try:
            networks[name] = recipe.get_submodule(name)
        except AttributeError as error:
            raise OwlError(
                "recipe.exports",
                f"the recipe {type(recipe).__qualname__} has no {name}, expected the name of a submodule; list the "
                "networks that it exports in its attribute exports",
            ) from error
    return networks


def rebuild(checkpoint: str | Path, name: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a network of a training checkpoint, with the code of the recipe that trained it.

    Args:
        checkpoint: A ``.ckpt`` file written by fit.
        name: Name of one of the networks that the recipe exports; required if there are several.

    Returns:
        The network on the CPU in eval mode, and the content of the checkpoint.

    Raises:
        OwlError: See `rebuild_all`, or the name is not that of one network.
    """
    networks, content = rebuild_all(checkpoint)
    chosen = list(networks) if name is None else [name]
    if len(chosen) > 1 or chosen[0] not in networks:
        raise OwlError(
            "network.name",
            f"{checkpoint} holds the networks {', '.join(networks)}, the name of one was expected, found "
            f"{name or 'none'}; in Python give it to owl.models.load, on the command line give the folder of one that "
            "python -m owl export wrote",
        )
    return networks[chosen[0]], content


def rebuild_all(checkpoint: str | Path) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Rebuild all networks that the recipe of a training checkpoint exports, with its code.

    Args:
        checkpoint: A ``.ckpt`` file written by fit.

    Returns:
        The networks by name on the CPU in eval mode, and the content of the checkpoint.

    Raises:
        OwlError: The file is missing or damaged, or the recipe it names is not trusted or cannot be rebuilt.
    """
    import importlib
    import warnings
    from argparse import ArgumentError

    from lightning.pytorch import LightningModule

    from owl.checkpoint import load_checkpoint

    content = load_checkpoint(checkpoint)
    class_path = str(content["owl"]["recipe"])
    check([class_path, content.get("hyper_parameters")], checkpoint)
    module, _, name = class_path.rpartition(".")
    try:
        recipe_class = getattr(importlib.import_module(module), name)
        if not (isinstance(recipe_class, type) and issubclass(recipe_class, LightningModule)):
            raise TypeError(f"{class_path} is no LightningModule")
        with warnings.catch_warnings():  # recipes intentionally store networks as hyperparameters
            warnings.filterwarnings("ignore", message="Attribute .* is an instance of `nn.Module`")
            recipe = recipe_class.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    except (ArgumentError, ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise OwlError(
            "network.rebuild",
            f"the recipe {class_path} of {checkpoint} cannot be rebuilt ({reason}); "
            f"use the code that trained it, {content['owl'].get('code_version', 'of an unknown version')}",
        ) from error
    return {name: network.eval() for name, network in exported(recipe).items()}, content


def fingerprint(module: nn.Module) -> str:
    """Return sixteen hexadecimal digits that identify a network by its weights.

    They are the same for a checkpoint and its export, on every machine, and do not change when weight normalisation is
    folded (in float32) or the module is frozen: weight-normalised weights are folded first.

    Args:
        module: Any network or part of one, such as the encoder to identify latents.

    Returns:
        The beginning of the SHA-256 of names, shapes and float32 values of all parameters and buffers.
    """
    import hashlib

    import torch

    from owl.nn.convolution import folded_weight, is_weight_normed

    tensors: dict[str, torch.Tensor] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    for path, layer in module.named_modules():
        if is_weight_normed(layer):
            prefix = f"{path}." if path else ""
            for original in ("original0", "original1"):
                del tensors[f"{prefix}parametrizations.weight.{original}"]
            tensors[f"{prefix}weight"] = folded_weight(layer)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def _whole_state(network: nn.Module) -> dict[str, Any]:
    """Return a network's state dict with its frozen parts."""
    from owl.nn.frozen import whole_state_dicts

    with whole_state_dicts():
        return network.state_dict()


def _load_export(directory: Path) -> nn.Module:
    import importlib

    import yaml
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torch import nn

    weights, config = directory / WEIGHTS, directory / CONFIG
    for path in (weights, config):
        if not path.is_file():
            raise OwlError(
                "export.missing",
                f"{path} does not exist, expected a folder with {WEIGHTS} and {CONFIG}; export a checkpoint",
            )
    try:
        content = yaml.safe_load(config.read_bytes())
        class_path, init_args = content["class_path"], content["init_args"]
        check(class_path, config)
        module_name, _, class_name = class_path.rpartition(".")
        network_class = getattr(importlib.import_module(module_name), class_name)
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise OwlError(
            "export.config",
            f"{config} names no network ({reason}), expected class_path and init_args; export the checkpoint again",
        ) from error
    if not (isinstance(network_class, type) and issubclass(network_class, nn.Module)):
        raise OwlError(
            "export.kind", f"{config} names {class_path}, expected a torch.nn.Module; export the checkpoint again"
        )
    try:
        tensors = load_file(weights)
        network: nn.Module = network_class(**init_args)
        expected = _whole_state(network).keys()
        for names, kind in ((expected - tensors.keys(), "missing"), (tensors.keys() - expected, "unknown")):
            if names:
                raise OwlError(
                    "export.weights",
                    f"{weights} has {len(names)} {kind} tensors such as {min(names)}, expected the tensors of the "
                    f"{class_path} that {config} describes; export the checkpoint again",
                )
        # assign: the network takes the dtype of the file.
        network.load_state_dict(tensors, strict=True, assign=True)
    except (SafetensorError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise OwlError(
            "export.weights", f"{weights} does not fit {config} ({reason}); export the checkpoint again"
        ) from error
    return network.eval()
