"""Callbacks that do to a run what the world does, named in the YAML of tests: signals, NaN, notes of what was seen."""

import os
import signal as signals
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class SendSignal(Callback):
    """Sends this very process a signal at the n-th call of a hook.

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
        """Send it when its time has come."""
        self.left -= 1
        if self.left == 0 and self.rank in (None, trainer.global_rank):
            for _ in range(self.times):
                os.kill(os.getpid(), self.signal)


class KillOnce(Callback):
    """Kills this very process, unless the run continues.

    Args:
        step: Optimiser steps before it.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.start = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the run begins."""
        self.start = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        """Kill it when its time has come."""
        if self.start == 0 and trainer.global_step == self.step:
            os.kill(os.getpid(), signals.SIGKILL)


class SignalWorkers(Callback):
    """Sends SIGTERM to the loader's workers, and to this very process only a whole epoch later.

    Args:
        step: Optimiser steps before it.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        """Send them when their time has come."""
        if trainer.global_step == self.step:
            workers = [str(child.pid) for child in psutil.Process().children()]
            subprocess.run(["kill", *workers], check=True)  # from outside: a parent may end its workers
        if trainer.global_step == self.step + 6:
            os.kill(os.getpid(), signals.SIGTERM)


class Poison(Callback):
    """Makes a weight, or only a gradient, NaN.

    Args:
        step: Optimiser steps before it.
        gradient: Whether only the gradient.
    """

    def __init__(self, step: int, gradient: bool = False) -> None:
        self.step, self.gradient = step, gradient

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Poison the first weight."""
        if trainer.global_step == self.step and not self.gradient:
            next(pl_module.parameters()).data.fill_(torch.nan)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Poison the first gradient."""
        if trainer.global_step == self.step and self.gradient:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.fill_(torch.nan)


class Diary(Callback):
    """Writes down the windows of every training batch, one line each, in a file per process.

    Args:
        folder: Where.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Append a line: epoch, then windows."""
        with open(self.folder / f"diary-{trainer.global_rank}.txt", "a") as file:
            print(trainer.current_epoch, *batch["window"].tolist(), file=file)
