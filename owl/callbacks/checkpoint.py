"""When checkpoints are written, and how: atomically, loadable with ``weights_only=True``."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

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
                f"could not write the checkpoint {path} ({error}); free space or choose another folder with --runs, "
                "then continue with --ckpt_path last (the previous checkpoint is intact)"
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

    Raises:
        OwlError: The file is missing, torn, or not a checkpoint.
    """
    try:
        with fsspec.open(str(path), "rb") as file:
            return torch.load(file, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise OwlError(f"there is no checkpoint {path}; give the path of a .ckpt file that fit wrote") from error
    except Exception as error:  # torch raises a dozen types for a file that is not a checkpoint
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OwlError(f"{path} is not a readable checkpoint ({reason}); give a .ckpt file that fit wrote") from error


class Checkpoint(LightningCheckpoint):
    """Keeps ``checkpoints/last.ckpt`` for resuming and ``checkpoints/best.ckpt`` by a metric.

    ``last.ckpt`` is written every ``every_n_steps`` optimiser steps, at the end of training, and when a SIGTERM
    arrives (the process then exits with status 143; ``--ckpt_path last`` continues it exactly).

    Args:
        every_n_steps: Optimiser steps between two writes of ``last.ckpt``.
        monitor: Validation metric that decides ``best.ckpt``; without it there is none.
        mode: ``min`` or ``max``: which direction of ``monitor`` is better.
    """

    def __init__(self, every_n_steps: int = 1000, monitor: str | None = None, mode: str = "min") -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be min or max, got {mode!r}")
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.mode = mode
        self.best = math.inf if mode == "min" else -math.inf
        self._step = 0

    @staticmethod
    def folder(trainer: Trainer) -> Path:
        """Return the folder of the run's checkpoints."""
        return Path(trainer.default_root_dir) / "checkpoints"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where a resumed run stands."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write ``last.ckpt`` in its interval; let the last step be followed by a validation whatever the interval."""
        if trainer.global_step >= trainer.max_steps > 0:
            trainer.should_stop = True
        elif trainer.global_step != self._step and trainer.global_step % self.every_n_steps == 0:
            self.save_last(trainer)
        self._step = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``best.ckpt`` when the monitored metric has improved."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or self.monitor is None:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise OwlError(f"checkpoint.monitor is '{self.monitor}', which is not logged; choose one of: {known}")
        value = float(trainer.callback_metrics[self.monitor])
        if value < self.best if self.mode == "min" else value > self.best:
            self.best = value
            trainer.save_checkpoint(self.folder(trainer) / "best.ckpt", weights_only=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the finished run."""
        self.save_last(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save when the machine is being taken away; after any other exception the state may be half a step."""
        if isinstance(exception, SIGTERMException):
            self.save_last(trainer)

    def save_last(self, trainer: Trainer) -> None:
        """Write ``last.ckpt``."""
        trainer.save_checkpoint(self.folder(trainer) / "last.ckpt", weights_only=False)

    def state_dict(self) -> dict[str, Any]:
        """Keep the best value across resumes."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best value."""
        self.best = state_dict["best"]
