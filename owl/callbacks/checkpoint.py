"""When checkpoints are written."""

import math
import signal
import threading
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from owl.distributed.agreement import Agreement
from owl.errors import OwlError

say = rank_zero_only(print)

SEVERITY = (0, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals, and 0 for none; where processes got different ones, the last of them counts."""


class Checkpoint(LightningCheckpoint):
    """Keeps ``checkpoints/last.ckpt`` for resuming and ``checkpoints/best.ckpt`` by a metric.

    ``last.ckpt`` is written every ``every_n_steps`` optimiser steps, before every validation, at the end of training,
    and when a SIGTERM arrives: the process then exits with status 143, and ``--ckpt_path last`` continues it exactly.
    SIGUSR1, by which clusters announce that time is running out, does the same with status 138: queue it again. So does
    SIGINT (Ctrl-C) with status 130; a second one stops at once.
    Of several processes any may get the signal; all stop together, at most one step after a single one would.
    It is only ever taken between two optimiser steps, never amid the accumulation of gradients, which it does not
    hold. A validation that was due when it was taken is made up for when the run continues. Training that is finished
    but for its last validation answers a SIGTERM by finishing.

    Args:
        every_n_steps: Optimiser steps between two writes of ``last.ckpt``.
        monitor: Validation metric that decides ``best.ckpt``; without it there is none.
        mode: Which direction of ``monitor`` is better.
    """

    def __init__(
        self, every_n_steps: int = 1000, monitor: str | None = None, mode: Literal["min", "max"] = "min"
    ) -> None:
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.mode = mode
        self.best = math.inf if mode == "min" else -math.inf
        self._step = 0
        self._validation_due = False
        self._signal = 0  # SIGTERM, SIGUSR1 or SIGINT if one has arrived
        self._nothing_to_lose = True  # whether last.ckpt holds everything that was trained so far
        self._end_of_training: dict[str, Any] | None = None

    @staticmethod
    def folder(trainer: Trainer) -> Path:
        """Return the folder of the run's checkpoints."""
        return Path(trainer.default_root_dir) / "checkpoints"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where a resumed run stands, wait for SIGTERM, make up for the validation that it missed."""
        self._step = trainer.global_step
        # Lightning's own handler (which is put back when training ends) raises after any batch, also in the middle of
        # an accumulation or of a validation, neither of which can be continued exactly.
        self._signal = signal.SIGTERM if trainer.received_sigterm else 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, self._on_signal)
        self._agreement = Agreement()
        # Lightning's own question about SIGTERM, at every batch, waits for the device and is answered by ours.
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
            # The checkpoint is of an epoch's last batch. Unless told that an epoch begins, Lightning does not count it,
            # and a run that is interrupted once more would repeat it.
            loop.reset_restart_stage()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._signal == signal.SIGINT:
                raise KeyboardInterrupt
            say("\nstopping with a checkpoint once this step is over; Ctrl-C again stops at once", flush=True)
        if not (self._signal == signal.SIGUSR1 and number == signal.SIGTERM):  # the end that SIGUSR1 has announced
            self._signal = number

    @property
    def exit_status(self) -> int:
        """What a process that was told to stop exits with: 128 and the number of the signal, as shells report it."""
        return 128 + self._signal

    def _stopping(self) -> bool:
        """Whether any process was sent a signal; all agree on whether and which, so that they stop at the same step.

        Several processes learn of it one call later: asking at once would make every step wait for its device.
        """
        agreed = self._agreement(SEVERITY.index(self._signal))
        if agreed == SEVERITY.index(signal.SIGUSR1):
            self._signal = signal.SIGUSR1
        self._signal = self._signal or SEVERITY[agreed]
        return agreed > 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimiser step: save where it is time to, stop where a SIGTERM has arrived."""
        self._nothing_to_lose = False
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        loop = trainer.fit_loop
        if trainer.global_step >= trainer.max_steps > 0:
            trainer.should_stop = True  # so that a validation follows the last step whatever its interval
        if trainer.should_stop and loop._can_stop_early:
            # When training ends Lightning counts the epoch as over. Kept from before, the run can be made longer.
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
        # Lightning raises once it has logged this step's metrics, unless a validation comes first.
        trainer._signal_connector.received_sigterm = stopping

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a validation that is due to the run that continues.

        Raises:
            SIGTERMException: A SIGTERM has arrived before it.
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
        """Give up a validation when a SIGTERM arrives.

        Raises:
            SIGTERMException: The run continues with this validation, from the checkpoint that was written before it.
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
                f"checkpoint.monitor is '{self.monitor}', which is not logged; choose one of: {known}",
            )
        value = float(trainer.callback_metrics[self.monitor])
        if value < self.best if self.mode == "min" else value > self.best:
            self.best = value
            trainer.save_checkpoint(self.folder(trainer) / "best.ckpt", weights_only=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the finished run; from here on Ctrl-C stops whatever follows."""
        self._agreement.finish()
        self.save_last(trainer)
        self._release_ctrl_c()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let Ctrl-C stop whatever follows."""
        self._release_ctrl_c()

    def _release_ctrl_c(self) -> None:
        """Undo what ``on_train_start`` did to SIGINT; Lightning itself puts the other signals' handlers back."""
        if signal.getsignal(signal.SIGINT) == self._on_signal:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def save_last(self, trainer: Trainer) -> None:
        """Write ``last.ckpt``, and before it the curves that led there; a fast_dev_run leaves nothing."""
        if trainer.fast_dev_run:
            return
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(self.folder(trainer) / "last.ckpt", weights_only=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a run that ended amid an epoch continue there when it is given more steps."""
        if self._end_of_training is not None:
            checkpoint["loops"] = self._end_of_training

    def state_dict(self) -> dict[str, Any]:
        """Keep across resumes the best value, and whether a validation comes before the next step."""
        return {"best": self.best, "validation_due": self._validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self.best = state_dict["best"]
        self._validation_due = state_dict["validation_due"]
