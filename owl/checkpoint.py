"""Read checkpoints with ``weights_only=True``."""

import pickle
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import torch

from owl.errors import OwlError


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint that contains only tensors and plain containers.

    Tensors are memory-mapped: unused parts are never read, and processes of one machine share pages. A remote file is
    first copied to the folder for temporary files.

    Raises:
        OwlError: The file is missing, damaged, or not a checkpoint.
    """
    try:
        if "://" in str(path):
            with tempfile.NamedTemporaryFile() as copy:  # deleted when it is closed; the mapping stays valid
                with fsspec.open(str(path), "rb") as file:
                    shutil.copyfileobj(file, copy)
                copy.flush()
                content = torch.load(copy.name, map_location=map_location, mmap=True, weights_only=True)
        else:
            content = torch.load(str(path), map_location=map_location, mmap=True, weights_only=True)
    except FileNotFoundError as error:
        raise OwlError(
            "checkpoint.missing", f"the checkpoint {path} does not exist; give the path of a .ckpt file written by fit"
        ) from error
    except Exception as error:  # torch raises many types for a file that is not a checkpoint
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if (
            isinstance(error, pickle.UnpicklingError) or "torch.save" in reason
        ):  # whose message suggests another way to load it
            reason = "it contains other objects than tensors, or was not saved by torch"
        raise OwlError(
            "checkpoint.unreadable", f"{path} is not a readable checkpoint ({reason}); give a .ckpt file written by fit"
        ) from error
    if not (isinstance(content, dict) and {"owl", "state_dict"} <= content.keys()):
        raise OwlError(
            "checkpoint.foreign",
            f"{path} was not written by python -m owl fit; give a .ckpt file of a run folder, or train in Python with "
            "the callback owl.callbacks.report.Report",
        )
    return content


def other_network(path: str | Path, content: dict[str, Any], recipe: object, differences: Sequence[str]) -> OwlError:
    """Return the error for a checkpoint whose weights are not those of the configured network.

    Args:
        path: The checkpoint.
        content: Its content.
        recipe: The configured recipe.
        differences: At least one weight that differs, and how, such as "missing network.bias".
    """
    found, expected = content["owl"]["recipe"], f"{type(recipe).__module__}.{type(recipe).__name__}"
    if found != expected:
        message = f"{path} was trained by {found}, this configuration is of {expected}; give the checkpoint of one"
    else:
        message = (
            f"the network in {path} differs from the configured one in {len(differences)} weights, such as: "
            f"{differences[0]}; use the model.network of the checkpoint, or train from scratch with another --name"
        )
    return OwlError("checkpoint.other-network", message)
