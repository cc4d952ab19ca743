"""Write checkpoints atomically and read them with ``weights_only=True``."""

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
    """Write a checkpoint next to its destination and rename it, so that an interruption never leaves a truncated file.

    Lightning's writer uses the system's temporary folder, from which a move to another file system is a copy that can
    be interrupted.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to a local path or an fsspec URL.

        Raises:
            OwlError: The disk is full or the folder is not writable; the previous checkpoint is intact.
        """
        if "://" in str(path):  # object stores replace objects atomically
            with fsspec.open(str(path), "wb") as file:
                torch.save(checkpoint, file)
            return
        try:
            atomic_write(path, lambda file: torch.save(checkpoint, file))
        except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError on a full disk
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OwlError(
                "checkpoint.unwritable",
                f"could not write the checkpoint {path} ({reason}); free space or choose another folder with --runs, "
                "then resume with --ckpt_path last (the previous checkpoint is intact)",
            ) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load with ``weights_only=True``, so that an untrusted checkpoint cannot run code."""
        return load_checkpoint(path, map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint file."""
        filesystem, name = fsspec.core.url_to_fs(str(path))
        if filesystem.exists(name):
            filesystem.rm(name)


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
            "checkpoint.foreign", f"{path} was not written by python -m owl fit; give a .ckpt file of a run folder"
        )
    return content
