"""Networks, and their exchange format: a folder with ``model.safetensors`` and ``config.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from owl.atomic import atomic_write
from owl.errors import OwlError

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"


def save(network: nn.Module, directory: str | Path) -> None:
    """Write a network's weights, buffers and constructor arguments, each file atomically.

    Args:
        network: A network that keeps its constructor arguments, plain values only, as ``network.config``.
        directory: Local folder; created, files of an earlier export are replaced.

    Raises:
        OwlError: The network keeps no ``config``.
    """
    import yaml
    from safetensors.torch import save as to_bytes

    if not isinstance(getattr(network, "config", None), dict):
        raise OwlError(
            f"{type(network).__name__} has no attribute config, expected its constructor arguments as a dict; "
            "set self.config in its __init__"
        )
    class_path = f"{type(network).__module__}.{type(network).__qualname__}"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    text = yaml.safe_dump({"class_path": class_path, "init_args": network.config}, sort_keys=False)
    atomic_write(Path(directory) / WEIGHTS, to_bytes(tensors, metadata={"class_path": class_path}))
    atomic_write(Path(directory) / CONFIG, text)


def load(directory: str | Path) -> nn.Module:
    """Rebuild a network that ``save`` or ``python -m owl export`` wrote.

    Args:
        directory: Folder with ``model.safetensors`` and ``config.yaml``.

    Returns:
        The network on the CPU in eval mode, in the dtype it was saved in, with outputs equal to the saved one's.

    Raises:
        OwlError: A file is missing or damaged, the class cannot be imported, or weights and arguments disagree.
    """
    import importlib

    import yaml
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torch import nn

    weights, config = Path(directory) / WEIGHTS, Path(directory) / CONFIG
    for path in (weights, config):
        if not path.is_file():
            raise OwlError(f"{path} does not exist, expected a folder with {WEIGHTS} and {CONFIG}; export a checkpoint")
    try:
        content = yaml.safe_load(config.read_text())
        class_path, init_args = content["class_path"], content["init_args"]
        module_name, _, class_name = class_path.rpartition(".")
        network_class = getattr(importlib.import_module(module_name), class_name)
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise OwlError(
            f"{config} names no network ({reason}), expected class_path and init_args; export the checkpoint again"
        ) from error
    if not (isinstance(network_class, type) and issubclass(network_class, nn.Module)):
        raise OwlError(f"{config} names {class_path}, expected a torch.nn.Module; export the checkpoint again")
    try:
        tensors = load_file(weights)
        network: nn.Module = network_class(**init_args)
        expected = network.state_dict().keys()
        for names, kind in ((expected - tensors.keys(), "missing"), (tensors.keys() - expected, "unknown")):
            if names:
                raise OwlError(
                    f"{weights} has {len(names)} {kind} tensors such as {min(names)}, expected the tensors of the "
                    f"{class_path} that {config} describes; export the checkpoint again"
                )
        # assign: the network takes the dtype of the file instead of casting the file to its own.
        network.load_state_dict(tensors, strict=True, assign=True)
    except (SafetensorError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise OwlError(f"{weights} does not fit {config} ({reason}); export the checkpoint again") from error
    return network.eval()
