"""Callbacks for tests, named in YAML: signals, NaN, a log of the windows that were trained on, a simulated clock."""

import os
import signal as signals
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import timer


class SendSignal(Callback):
    """Sends its own process a signal at the n-th call of a hook.

    Args:
        signal: SIGTERM, SIGKILL or SIGINT.
        hook: A callback's hook.
        call: n, from 1.
        times: How often it is sent.
        rank: To which process of the run; None: to all.
    """

    def __init__(self, signal: str, hook: str, call: int, times: int = 1, rank: int | None = None) -> None:
        self.signal = getattr(signals, signal)
        self.left = call
        self.times = times
        self.rank = rank
        setattr(self, hook, self.count)

    def count(self, trainer: Trainer, *arguments: Any) -> None:
        """Send it at its step."""
        self.left -= 1
        if self.left == 0 and self.rank in (None, trainer.global_rank):
            for _ in range(self.times):
                os.kill(os.getpid(), self.signal)


class KillOnce(Callback):
    """Kills its own process, unless the run continues.

    Args:
        step: Optimiser steps before it.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.start = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the run starts."""
        self.start = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        """Kill it at its step."""
        if self.start == 0 and trainer.global_step == self.step:
            os.kill(os.getpid(), signals.SIGKILL)


class SignalWorkers(Callback):
    """Sends a signal to the loader's workers: a job scheduler's, or that of the system when memory runs out.

    Args:
        step: Optimiser steps before it.
        signal: SIGTERM or SIGKILL.
    """

    def __init__(self, step: int, signal: str) -> None:
        self.step, self.signal = step, signal

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        """Send it at its step."""
        if trainer.global_step == self.step:
            workers = [str(child.pid) for child in psutil.Process().children()]
            subprocess.run(["kill", "-s", self.signal, *workers], check=True)  # from outside: a parent may end its own


class SetNaN(Callback):
    """Makes a weight, or only a gradient, NaN.

    Args:
        step: Optimiser steps before it.
        gradient: Whether only the gradient.
    """

    def __init__(self, step: int, gradient: bool = False) -> None:
        self.step, self.gradient = step, gradient

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Set the first weight."""
        if trainer.global_step == self.step and not self.gradient:
            next(pl_module.parameters()).data.fill_(torch.nan)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Set the first gradient."""
        if trainer.global_step == self.step and self.gradient:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.fill_(torch.nan)


class WindowLog(Callback):
    """Writes the windows of every training batch, one line each, in a file per process.

    Args:
        folder: Where.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Append a line: epoch, then windows."""
        with open(self.folder / f"windows-{trainer.global_rank}.txt", "a") as file:
            print(trainer.current_epoch, *batch["window"].tolist(), file=file)


class Stopwatch(Callback):
    """Lets the trainer's timers see a simulated time, which passes in steps and validations alone.

    Args:
        seconds: Of each step; where there are several, in turns.
        first: Seconds that the first step takes longer.
        later: Factor from optimiser step ``at`` on.
        at: That step.
        validation: Seconds of each validation.
        rank: The process on which time passes; on others it stands still.
    """

    def __init__(
        self,
        seconds: list[float],
        first: float = 0.0,
        later: float = 1.0,
        at: int = 0,
        validation: float = 0.0,
        rank: int = 0,
    ) -> None:
        self.seconds, self.first, self.later, self.at, self.validation = seconds, first, later, at, validation
        self.rank = rank
        self.now = self.start = 1000.0
        self.rates: list[float] = []
        self.validated: list[int] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the clock."""
        timer.time = SimpleNamespace(monotonic=lambda: self.now)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put it back."""
        timer.time = time

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put it back."""
        timer.time = time

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Let the step's time pass; note its learning rate."""
        step = trainer.global_step
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        passed = self.seconds[step % len(self.seconds)] * (self.later if step >= self.at else 1.0)
        self._pass(trainer, passed + (self.first if len(self.rates) == 1 else 0.0))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the validation's time pass."""
        self.validated.append(trainer.global_step)
        self._pass(trainer, self.validation)

    def _pass(self, trainer: Trainer, seconds: float) -> None:
        if trainer.global_rank == self.rank:
            self.now += seconds
