"""Checkpoints on disk: written atomically, read with ``weights_only=True``."""

import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from owl.atomic import atomic_write
from owl.errors import OwlError


class AtomicCheckpointIO(CheckpointIO):
    """Writes a checkpoint beside its destination and renames it, so that a kill never leaves a torn file.

    Lightning's own writer goes through the system's temporary folder, from where a move to another file system is
    a copy and can be cut off.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to a local path or an fsspec URL.

        Raises:
            OwlError: The disk is full or the folder unwritable; the previous checkpoint is untouched.
        """
        if "://" in str(path):  # object stores replace whole objects atomically by themselves
            with fsspec.open(str(path), "wb") as file:
                torch.save(checkpoint, file)
            return
        try:
            atomic_write(path, lambda file: torch.save(checkpoint, file))
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            raise OwlError(
                "checkpoint.unwritable",
                f"could not write the checkpoint {path} ({error}); free space or choose another folder with --runs, "
                "then continue with --ckpt_path last (the previous checkpoint is intact)",
            ) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load with ``weights_only=True``: a checkpoint from a stranger cannot run code."""
        return load_checkpoint(path, map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint file."""
        filesystem, name = fsspec.core.url_to_fs(str(path))
        if filesystem.exists(name):
            filesystem.rm(name)


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint, refusing anything but tensors and plain containers.

    Its tensors are mapped into memory: what a process does not use of them is never read, and processes of one machine
    share what they do. A remote one is copied to the folder for temporary files first.

    Raises:
        OwlError: The file is missing, torn, or not a checkpoint.
    """
    try:
        if "://" in str(path):
            with tempfile.NamedTemporaryFile() as copy:  # gone once it is closed, but for what is mapped
                with fsspec.open(str(path), "rb") as file:
                    shutil.copyfileobj(file, copy)
                copy.flush()
                content = torch.load(copy.name, map_location=map_location, mmap=True, weights_only=True)
        else:
            content = torch.load(str(path), map_location=map_location, mmap=True, weights_only=True)
    except FileNotFoundError as error:
        raise OwlError(
            "checkpoint.missing", f"there is no checkpoint {path}; give the path of a .ckpt file that fit wrote"
        ) from error
    except Exception as error:  # torch raises a dozen types for a file that is not a checkpoint
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError) or "torch.save" in reason:  # whose advice is to load it otherwise
            reason = "it holds more than tensors, or nothing that torch has saved"
        raise OwlError(
            "checkpoint.unreadable", f"{path} is not a readable checkpoint ({reason}); give a .ckpt file that fit wrote"
        ) from error
    if not (isinstance(content, dict) and {"owl", "state_dict"} <= content.keys()):
        raise OwlError(
            "checkpoint.foreign", f"{path} was not written by python -m owl fit; give a .ckpt file of a run folder"
        )
    return content
