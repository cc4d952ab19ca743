"""Write checkpoints during training and when a run is interrupted."""

import math
import signal
import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import fsspec
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from owl.atomic import atomic_write
from owl.checkpoint import load_checkpoint
from owl.distributed.agreement import Agreement
from owl.errors import OwlError, at_least

say = rank_zero_only(print)

SEVERITY = (0, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals, and 0 for none; if ranks received different ones, the last in this order applies."""


class Checkpoint(LightningCheckpoint):
    """Keep ``checkpoints/last.ckpt`` for resuming and ``checkpoints/best.ckpt`` by a metric.

    ``last.ckpt`` is written every ``every_n_steps`` optimiser steps, before every validation, at the end of training,
    and on SIGTERM: the process then exits with status 143, and ``--ckpt_path last`` resumes exactly. SIGUSR1, which
    clusters send before the time limit, does the same with status 138, and SIGINT (Ctrl-C) with status 130. A second
    SIGINT stops immediately. The signal can be sent to any rank; all ranks stop at the same step, at most one step
    later than a single process. A checkpoint is written between two optimiser steps only, never during gradient
    accumulation, since it does not store accumulated gradients. A validation that was due is run when the run is
    resumed. On SIGTERM during the last validation, training finishes normally.

    Args:
        every_n_steps: Optimiser steps between writes of ``last.ckpt``.
        monitor: Validation metric that selects ``best.ckpt``; None: no ``best.ckpt``.
        mode: Whether the lowest ("min") or highest ("max") value of ``monitor`` is best.

    Raises:
        OwlError: ``every_n_steps`` is below 1.
    """

    def __init__(
        self, every_n_steps: int = 1000, monitor: str | None = None, mode: Literal["min", "max"] = "min"
    ) -> None:
        at_least(1, **{"checkpoint.every_n_steps": every_n_steps})
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.mode = mode
        self.best = math.inf if mode == "min" else -math.inf
        self._step = 0
        self._validation_due = False
        self._signal = 0  # SIGTERM, SIGUSR1 or SIGINT if one has arrived
        self._nothing_to_lose = True  # whether last.ckpt contains all training so far
        self._end_of_training: dict[str, Any] | None = None

    @staticmethod
    def folder(trainer: Trainer) -> Path:
        """Return the folder of the run's checkpoints."""
        return Path(trainer.default_root_dir) / "checkpoints"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the step count of a resumed run, install signal handlers, and run a validation that was skipped."""
        self._step = trainer.global_step
        # Lightning's handler (restored when training ends) raises after any batch, also during gradient accumulation or
        # validation, neither of which can be resumed exactly.
        self._signal = signal.SIGTERM if trainer.received_sigterm else 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, self._on_signal)
        self._agreement = Agreement()
        # Lightning's broadcast about SIGTERM at every batch synchronises the device; `_stopping` replaces it.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if self._validation_due:
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation.restarting = False
            trainer.validating = True
            validation.run()
            trainer.training = True
        self._validation_due = False
        loop = trainer.fit_loop
        if loop.restarted_mid_epoch and loop.epoch_loop.restarted_on_train_batch_end and trainer.is_last_batch:
            # The checkpoint was written after the last batch of an epoch. Without the start of a new epoch, Lightning
            # does not count it, and a run that is interrupted again would repeat it.
            loop.reset_restart_stage()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._signal == signal.SIGINT:
                raise KeyboardInterrupt
            say("\nsaving a checkpoint after this step; press Ctrl-C again to stop immediately", flush=True)
        if not (self._signal == signal.SIGUSR1 and number == signal.SIGTERM):  # the termination that SIGUSR1 announced
            self._signal = number

    @property
    def exit_status(self) -> int:
        """Exit status after a signal: 128 plus its number, as in shells."""
        return 128 + self._signal

    def _stopping(self) -> bool:
        """Return whether any rank received a signal; all ranks agree on it, so that they stop at the same step.

        With several ranks the result is one call late: a blocking reduction would make every step wait for the device.
        """
        agreed = self._agreement(SEVERITY.index(self._signal))
        if agreed == SEVERITY.index(signal.SIGUSR1):
            self._signal = signal.SIGUSR1
        self._signal = self._signal or SEVERITY[agreed]
        return agreed > 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after an optimiser step when due, and stop after a signal."""
        self._nothing_to_lose = False
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        loop = trainer.fit_loop
        if trainer.global_step >= trainer.max_steps > 0:
            trainer.should_stop = True  # so that the last step is followed by a validation for any interval
        if trainer.should_stop and loop._can_stop_early:
            # Lightning counts the epoch as complete when training ends. Keep the state to allow longer training.
            self._end_of_training = deepcopy(trainer._checkpoint_connector._get_loops_state_dict())
            return
        if trainer.max_epochs is not None and trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs:
            return
        stopping = self._stopping()
        assert loop._data_fetcher is not None
        self._validation_due = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        if stopping or self._validation_due or trainer.global_step % self.every_n_steps == 0:
            self.save_last(trainer)
            self._nothing_to_lose = True
        self._validation_due = False
        # Lightning raises after it has logged this step's metrics, unless a validation comes first.
        trainer._signal_connector.received_sigterm = stopping

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Skip a validation after a signal; the resumed run runs it.

        Raises:
            SIGTERMException: A signal arrived before it.
        """
        if trainer.state.fn == "fit" and trainer.received_sigterm:
            raise SIGTERMException

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Abort a validation when a signal arrives.

        Raises:
            SIGTERMException: The resumed run starts with this validation, from the checkpoint written before it.
        """
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._nothing_to_lose and self._stopping():
            raise SIGTERMException

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``best.ckpt`` when the monitored metric has improved."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or self.monitor is None or trainer.fast_dev_run:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise OwlError(
                "checkpoint.monitor",
                f"checkpoint.monitor is '{self.monitor}', which is not logged; set it to one of: {known}",
            )
        value = float(trainer.callback_metrics[self.monitor])
        if value < self.best if self.mode == "min" else value > self.best:
            self.best = value
            trainer.save_checkpoint(self.folder(trainer) / "best.ckpt", weights_only=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the finished run; restore the default behaviour of Ctrl-C."""
        self._agreement.finish()
        self.save_last(trainer)
        self._release_ctrl_c()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the default behaviour of Ctrl-C."""
        self._release_ctrl_c()

    def _release_ctrl_c(self) -> None:
        """Restore the SIGINT handler; Lightning restores those of the other signals."""
        if signal.getsignal(signal.SIGINT) == self._on_signal:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def save_last(self, trainer: Trainer) -> None:
        """Flush the loggers and write ``last.ckpt``; write nothing in a fast_dev_run."""
        if trainer.fast_dev_run:
            return
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(self.folder(trainer) / "last.ckpt", weights_only=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Allow a run that ended within an epoch to continue there with a larger ``max_steps``."""
        if self._end_of_training is not None:
            checkpoint["loops"] = self._end_of_training

    def state_dict(self) -> dict[str, Any]:
        """Store the best value, and whether a validation is due before the next step."""
        return {"best": self.best, "validation_due": self._validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self.best = state_dict["best"]
        self._validation_due = state_dict["validation_due"]


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
