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

    from owl.nn.frozen import whole_state_dicts

    description = describe(network)
    if description is None:
        raise OwlError(
            "network.config",
            f"{type(network).__name__} has no attribute config, expected its constructor arguments as a dict; "
            "set self.config in its __init__",
        )
    with whole_state_dicts():
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    text = yaml.safe_dump(description, sort_keys=False)
    atomic_write(Path(directory) / WEIGHTS, to_bytes(tensors, metadata={"class_path": description["class_path"]}))
    atomic_write(Path(directory) / CONFIG, text)


def describe(network: nn.Module) -> dict[str, Any] | None:
    """Return ``class_path`` and ``init_args``, from which `load` builds a network again; None if it has no ``config``.

    Exports store it in config.yaml, checkpoints for every network that their recipe exports.
    """
    from owl.distributed.sharding import unsharded_class

    config = getattr(network, "config", None)
    if not isinstance(config, dict):
        return None
    kind = unsharded_class(network)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": config}


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
    return load_with_content(path, name)[0]


def load_with_content(path: str | Path, name: str | None = None) -> tuple[nn.Module, dict[str, Any] | None]:
    """Load a network as `load` does, and return it with the content of the checkpoint, None for an export."""
    return rebuild(path, name) if str(path).endswith(CHECKPOINT_SUFFIX) else (_load_export(Path(path)), None)


def find_checkpoint(run: str) -> str:
    """Return the last checkpoint of a run folder; checkpoints and exports are returned unchanged."""
    if run.endswith(CHECKPOINT_SUFFIX) or (Path(run) / WEIGHTS).exists():
        return run
    return str(Path(run) / "checkpoints" / f"last{CHECKPOINT_SUFFIX}")


def exported(recipe: nn.Module) -> dict[str, nn.Module]:
    """Return the networks that a recipe exports, by name.

    A recipe lists the names of submodules in its attribute ``exports``, such as ``("encoder", "decoder")``. These are
    exported and averaged (`owl.callbacks.ema.EMA`); others, such as a critic, are not. A recipe without the attribute
    exports its ``network``, if it has one, and everything it trains is averaged.

    Raises:
        OwlError: It has no submodule with such a name.
    """
    networks = {}
    for name in getattr(recipe, "exports", ("network",) if hasattr(recipe, "network") else ()):
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
    """Rebuild a network of a training checkpoint.

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
            f"{checkpoint} holds the networks {', '.join(networks)}, expected the name of one, found "
            f"{name or 'none'}; in Python pass it to owl.models.load, on the command line give a folder written by "
            "python -m owl export",
        )
    return networks[chosen[0]], content


def rebuild_all(checkpoint: str | Path) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Rebuild all networks that the recipe of a training checkpoint exports, without the recipe.

    The recipe may need files that were there when it was trained, such as the checkpoint of an earlier stage; the
    networks do not.

    Args:
        checkpoint: A ``.ckpt`` file written by fit.

    Returns:
        The networks by name on the CPU in eval mode, and the content of the checkpoint.

    Raises:
        OwlError: The file is missing or damaged, describes no network, or one that is not trusted or cannot be built.
    """
    from owl.checkpoint import load_checkpoint

    content = load_checkpoint(checkpoint)
    descriptions = content["owl"].get("networks") or {}
    if not descriptions:
        raise OwlError(
            "network.rebuild",
            f"{checkpoint} describes no network, expected one that the recipe exports with its constructor arguments "
            "in the attribute config; set self.config in the network's __init__ and train again",
        )
    networks = {}
    for name, description in descriptions.items():
        try:
            network = _build(description, checkpoint)
            state = {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in content["state_dict"].items()
                if key.startswith(f"{name}.")
            }
            network.load_state_dict(state)  # frozen parts, which the checkpoint leaves out, are completed
        except (ImportError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise OwlError(
                "network.rebuild",
                f"the network {description} of {checkpoint} cannot be rebuilt ({reason}); "
                f"use the code that trained it, {content['owl'].get('code_version', 'of an unknown version')}",
            ) from error
        networks[name] = network.eval()
    return networks, content


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


def _build(description: dict[str, Any], file: str | Path) -> nn.Module:
    """Build an untrained network from its description in a file.

    Raises:
        OwlError: It names a class that is not trusted, or impossible arguments.
        Exception: It names no class, one that cannot be imported or is no network, or unknown arguments.
    """
    import importlib

    from torch import nn

    class_path, init_args = description["class_path"], description["init_args"]
    check(description, file)
    module_name, _, class_name = class_path.rpartition(".")
    network_class = getattr(importlib.import_module(module_name), class_name)
    if not (isinstance(network_class, type) and issubclass(network_class, nn.Module)):
        raise TypeError(f"{class_path} is no torch.nn.Module")
    network: nn.Module = network_class(**init_args)
    return network


def _load_export(directory: Path) -> nn.Module:
    import yaml
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from owl.nn.frozen import whole_state_dicts

    weights, config = directory / WEIGHTS, directory / CONFIG
    for path in (weights, config):
        if not path.is_file():
            raise OwlError(
                "export.missing",
                f"{path} does not exist, expected a folder with {WEIGHTS} and {CONFIG}; export a checkpoint",
            )
    try:
        network = _build(yaml.safe_load(config.read_bytes()), config)
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise OwlError(
            "export.config",
            f"{config} describes no network ({reason}), expected class_path and init_args; export the checkpoint again",
        ) from error
    try:
        tensors = load_file(weights)
        with whole_state_dicts():
            expected = network.state_dict().keys()
        for names, kind in ((expected - tensors.keys(), "missing"), (tensors.keys() - expected, "unknown")):
            if names:
                raise OwlError(
                    "export.weights",
                    f"{weights} has {len(names)} {kind} tensors such as {min(names)}, expected the tensors of the "
                    f"{type(network).__qualname__} that {config} describes; export the checkpoint again",
                )
        # assign: the network takes the dtype of the file.
        network.load_state_dict(tensors, strict=True, assign=True)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise OwlError(
            "export.weights", f"{weights} does not fit {config} ({reason}); export the checkpoint again"
        ) from error
    return network.eval()
