"""Run trials, each as a separate process of ``fit``, monitored by the worker."""

import ctypes
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from owl.errors import OwlError
from owl.sweep.plan import Plan, Setting, options, plain
from owl.sweep.study import HEARTBEAT, METRICS, PRUNED, SweepStudy, chain_number, unknown_objective

LOG = "log.txt"
PAUSE = 0.2
"""Seconds between polls of the trials."""
IDLE_PAUSE = 1.0
"""The same if more trials can be started, which queries the storage."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that stop a worker: from the user, from a cluster on preemption, and from a cluster before its time limit."""
FROM_OUTSIDE = {-signal.SIGKILL, -signal.SIGHUP, *(-number for number in STOPS), *(128 + number for number in STOPS)}
"""Exit statuses of a trial that was ended by the user, by the system for lack of memory, or by a cluster."""
BUSY = "[run.busy]"
"""End of a trial's output if the process that it continues still holds the run folder."""
LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_")
"""Prefixes of the environment variables with which launchers set the rank."""
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass
class Child:
    """A running trial: its number, the number of its chain, its process and its run folder."""

    number: int
    chain: int
    process: subprocess.Popen[bytes]
    folder: Path
    began: float = field(default_factory=time.monotonic)
    seen: float = field(default_factory=time.monotonic)
    """Time of its last heartbeat."""

    def print(self, message: str) -> None:
        """Print a message about the trial."""
        print(f"trial {self.chain} {message}", flush=True)

    def kill(self) -> None:
        """Kill its process and all child processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Workers:
    """Run the trials of a sweep until all trials, including those of other workers, have ended or a signal arrives.

    After a signal, trials save a checkpoint and can be continued by another worker. A second SIGINT kills them. If
    this process is killed, its trials also end (on Linux), and another worker continues them.

    Args:
        study: The sweep's study.
        runs: Folder that holds the run folders.
        arguments: Arguments of ``fit`` for the experiment.
        count: Number of parallel trials.
        threads: OpenMP threads of each trial; None keeps the default of the libraries.
        storage: URL of the study, for the trials.
        report: Called after each trial.
    """

    def __init__(
        self,
        study: SweepStudy,
        runs: Path,
        arguments: list[str],
        count: int,
        threads: int | None,
        storage: str,
        report: Callable[[], None],
    ) -> None:
        self.study, self.plan, self.runs, self.arguments = study, study.plan, runs, arguments
        self.count, self.threads, self.storage, self.report = count, threads, storage, report
        self.children: list[Child] = []
        self.signal: int | None = None
        """The received signal."""
        self._is_stopping = self._kills = False
        self._error: OwlError | None = None

    def run(self) -> None:
        """Run trials until the sweep is done or a signal arrives.

        Raises:
            OwlError: A trial does not log the objective.
        """
        before = {number: signal.signal(number, self._on_signal) for number in STOPS}
        try:
            while self._step():
                time.sleep(PAUSE if len(self.children) == self.count else IDLE_PAUSE)
        finally:
            for child in self.children:  # if this process fails; others continue them
                child.process.terminate()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._error is not None:
            raise self._error

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            self._kills = True
        if not (self.signal == signal.SIGUSR1 and number == signal.SIGTERM):  # the end that SIGUSR1 has announced
            self.signal = number

    def _step(self) -> bool:
        """Poll the trials, start or stop some; return whether any are left, here or for other workers."""
        if self.signal is not None:
            self._stop()
        try:
            for child in list(self.children):
                self._supervise(child)
            if self.signal is not None or len(self.children) == self.count:
                return bool(self.children)
            self.study.revive()
            if self._begin() or self.children:
                return True
            return any(t.state in (TrialState.RUNNING, TrialState.WAITING) for t in self.study.chains())
        except StorageInternalError as error:  # trials continue training, and the write is retried
            print(f"the database is unavailable, retrying: {' '.join(str(error.__cause__).split())}", flush=True)
            return not self._kills

    def _stop(self) -> None:
        """Let the trials save a checkpoint and end; after a second SIGINT, kill them."""
        if not self._is_stopping:
            print(f"stopping {len(self.children)} trials, which save a checkpoint; Ctrl-C kills them", flush=True)
            for child in self.children:
                child.process.terminate()
        elif self._kills:
            for child in self.children:
                child.kill()
        self._is_stopping = True

    def _begin(self) -> bool:
        """Start a trial if there is one left."""
        claimed = self.study.claim()
        if claimed is None:
            return False
        number, setting = claimed
        chain = chain_number(self.study.trial(number))
        folder = self.runs / trial_name(self.plan, chain)
        if chain == number:  # a folder left by an older sweep of the same name is not continued
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOG, "ab") as log:
            process = subprocess.Popen(
                self.command(number, chain, setting),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                start_new_session=True,  # Ctrl-C reaches only this process, which then stops its trials
                preexec_fn=end_with_parent,
            )
        self.children.append(Child(number, chain, process, folder))
        drawn = ", ".join(f"{key.rpartition('.')[2]} {short(value)}" for key, value in setting.items())
        self.children[-1].print(f"{'begins' if chain == number else 'continues'}: {drawn}")
        return True

    def command(self, number: int, chain: int, setting: Setting) -> list[str]:
        """Return the command line of a trial."""
        callback = {"storage": self.storage, "study": self.plan.name, "trial": number}
        return [
            *(sys.executable, "-m", "owl", "fit", *self.arguments, *options(setting)),
            *("--runs", str(self.runs), "--name", trial_name(self.plan, chain), "--ckpt_path", "last"),
            "--trainer.callbacks+=owl.callbacks.pruning.Pruning",
            *(f"--trainer.callbacks.{key}={value}" for key, value in callback.items()),
        ]

    def environment(self) -> dict[str, str]:
        """Return the environment variables of a trial, without the rank variables of the worker's launcher."""
        variables = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
        if self.threads is not None:
            variables |= {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        return variables

    def _supervise(self, child: Child) -> None:
        """Record the result of a trial that has ended, or a heartbeat for a running one."""
        if child.process.poll() is not None:
            self._finish(child)
            self.children.remove(child)
            self.study.revive()
            self.report()
        elif time.monotonic() - child.seen > HEARTBEAT:
            if not self.study.beat(child.number):
                child.kill()  # this process recorded no heartbeat for so long that the trial counts as killed
                self.children.remove(child)
                child.print("was taken over by another worker")
            child.seen = time.monotonic()

    def _finish(self, child: Child) -> None:
        """Record the result of a trial."""
        tell, status, seconds = self.study.tell, child.process.returncode, time.monotonic() - child.began
        attributes = self.study.trial(child.number).user_attrs
        metrics = read_metrics(child.folder) if status == 0 else {}
        known = attributes.get(METRICS, sorted(metrics))
        reason = last_line(child.folder / LOG) or f"it ended with status {status}"
        value = float(metrics.get(self.plan.objective, math.nan))
        if known and self.plan.objective not in known:
            tell(child.number, TrialState.FAIL, stopped=True)
            self._error = unknown_objective(self.plan.objective, known)
            self.signal = self.signal or signal.SIGTERM
        elif status in FROM_OUTSIDE or (status and reason.endswith(BUSY)):
            is_stop = self.signal is not None or status not in FROM_OUTSIDE
            tell(child.number, TrialState.FAIL, **{"stopped": True} if is_stop else {})
            reason = "the sweep was stopped" if self.signal else f"its process was killed (status {status})"
            child.print(f"is interrupted, {reason}")
        elif status == 0 and PRUNED in attributes:
            tell(child.number, TrialState.PRUNED)
            child.print(f"pruned after validation {attributes[PRUNED]} and {seconds:.0f} s")
        elif math.isfinite(value):
            tell(child.number, TrialState.COMPLETE, value)
            best = self.study.best()
            is_best = best is not None and best.number == child.number
            child.print(
                f"done in {seconds:.0f} s: {self.plan.objective} {short(value)}{', the best so far' if is_best else ''}"
            )
        else:
            reason = reason if status else f"{self.plan.objective} is {value}"
            tell(child.number, TrialState.FAIL, reason=reason)
            child.print(f"failed after {seconds:.0f} s: {reason} (see {child.folder / LOG})")


def trial_name(plan: Plan, chain: int) -> str:
    """Return the name of a trial's run."""
    return f"{plan.name}/trial-{chain:04d}"


def short(value: object) -> str:
    """Format a number with four significant digits; return other values as text."""
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def end_with_parent() -> None:
    """Let this new process receive SIGTERM when its parent process ends for any reason."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def read_metrics(folder: Path) -> dict[str, float]:
    """Return the metrics of a finished run; empty if it has none."""
    try:
        return json.loads((folder / "metrics.json").read_bytes())
    except (OSError, ValueError):
        return {}


def last_line(log: Path) -> str:
    """Return the last line of a process's output, its error message."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("owl: error: ") if lines else ""
