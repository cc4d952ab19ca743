"""Running trials: one process of ``fit`` each, watched by one that neither crashes nor runs out of memory with it."""

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

from optuna.trial import TrialState

from owl.errors import OwlError
from owl.sweep.plan import Plan, Setting, options, plain
from owl.sweep.study import METRICS, PRUNED, Outcome, SweepStudy, chain_number

LOG = "log.txt"
PAUSE = 0.2
"""Seconds between two looks at the children."""
IDLE_PAUSE = 1.0
"""The same at the end, when only other workers' trials are left."""
SIGN_OF_LIFE = 30.0
"""Seconds between two renewals of a lease."""
PATIENCE = 90.0
"""Seconds that a trial gets to save its checkpoint before it is killed: less than a cluster's notice of two minutes."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What stops a worker: the user, a cluster that takes its machine, and one that announces the end of its time."""
FROM_OUTSIDE = {-signal.SIGKILL, -signal.SIGHUP, *(-number for number in STOPS), *(128 + number for number in STOPS)}
"""Exit statuses of a trial that someone ended: the user, the system short of memory, a cluster."""
LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_")
"""Beginnings of the variables by which a launched process knows its rank."""
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass
class Child:
    """A trial that trains.

    Args:
        number: The trial.
        chain: What it is called by.
        process: Its process.
        folder: Its run folder.
    """

    number: int
    chain: int
    process: subprocess.Popen[bytes]
    folder: Path
    began: float = field(default_factory=time.monotonic)
    seen: float = field(default_factory=time.monotonic)
    """When its lease was renewed last."""


class Workers:
    """Works on a sweep until every trial has ended, those of other workers too, or until a signal stops it.

    Stopped, trials save a checkpoint and wait for the next worker to continue them. A SIGINT meanwhile kills them.
    Should this process itself be killed, its trials end as well (on Linux), and another worker continues them.

    Args:
        study: The sweep's study.
        plan: The sweep.
        runs: Folder that holds the run folders.
        arguments: Of ``fit``: the experiment.
        count: Trials at a time.
        threads: OpenMP threads of each trial; None leaves that to the libraries.
        storage: Address of the study, for the trials.
        report: Called after each trial.
    """

    def __init__(
        self,
        study: SweepStudy,
        plan: Plan,
        runs: Path,
        arguments: list[str],
        count: int,
        threads: int | None,
        storage: str,
        report: Callable[[], None],
    ) -> None:
        self.study, self.plan, self.runs, self.arguments = study, plan, runs, arguments
        self.count, self.threads, self.storage, self.report = count, threads, storage, report
        self.children: list[Child] = []
        self.signal: int | None = None
        """That has arrived."""
        self._interrupts = 0
        self._says_it_waits = False

    def run(self) -> None:
        """Work.

        Raises:
            OwlError: The first trial does not log the objective.
        """
        before = {number: signal.signal(number, self._on_signal) for number in STOPS}
        try:
            while self.signal is None:
                self._collect()
                if len(self.children) == self.count:
                    time.sleep(PAUSE)
                elif not self._begin():
                    if not self.children and not self._others_work():
                        break
                    time.sleep(PAUSE if self.children else IDLE_PAUSE)
        finally:
            try:
                self._stop()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not (self.signal == signal.SIGUSR1 and number == signal.SIGTERM):  # the end that SIGUSR1 has announced
            self.signal = number
        self._interrupts += number == signal.SIGINT  # a cluster may send the same signal more than once

    # ------------------------------------------------------------ beginning

    def _begin(self) -> bool:
        """Begin a trial where there is one left; first let those be continued whose workers are gone."""
        for trial in self.study.lost():
            continued = self.study.interrupt(trial.number, "its worker was killed", killed=True)
            self._say(chain_number(trial), "has lost its worker" + ("" if continued else ", too often: it failed"))
        claimed = self.study.claim(self.plan)
        if claimed is None:
            return False
        number, setting = claimed
        chain = chain_number(self.study.trial(number))
        name = trial_name(self.plan, chain)
        folder = self.runs / name
        if chain == number:  # what an older sweep of the same name has left is nothing to continue
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOG, "ab") as log:
            process = subprocess.Popen(
                self.command(number, chain, setting),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                start_new_session=True,  # Ctrl-C reaches this process alone, which then tells its trials
                preexec_fn=None if LIBC is None else die_with(os.getpid()),
            )
        self.study.renew(number, process.pid)
        self.children.append(Child(number, chain, process, folder))
        drawn = ", ".join(f"{key.rpartition('.')[2]} {short(value)}" for key, value in setting.items())
        self._say(chain, f"{'begins' if chain == number else 'continues'}: {drawn}")
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
        """Return the variables of a trial, which is a run of its own even where its worker was launched with ranks."""
        variables = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
        if self.threads is not None:
            variables |= {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        return variables

    def _others_work(self) -> bool:
        """Whether other workers still train: one of them may be killed, and its trial is then continued here."""
        left = [t for t in self.study.chains() if t.state in (TrialState.RUNNING, TrialState.WAITING)]
        if left and not self._says_it_waits:
            self._says_it_waits = True
            print(f"waiting for {len(left)} trials of other workers; Ctrl-C leaves them to those", flush=True)
        return bool(left)

    # ------------------------------------------------------------ ending

    def _collect(self) -> None:
        """Record the trials that have ended, renew the leases of the others."""
        for child in list(self.children):
            if child.process.poll() is not None:
                self.children.remove(child)
                self._finish(child)
                self.report()
            elif time.monotonic() - child.seen > SIGN_OF_LIFE:
                child.seen = time.monotonic()
                if not self.study.renew(child.number, child.process.pid):
                    kill(child)  # this process was away for so long that another one has taken the trial over
                    self.children.remove(child)
                    self._say(child.chain, "was taken over by another worker")

    def _finish(self, child: Child) -> None:
        """Record how a trial ended.

        Raises:
            OwlError: It did not log the objective.
        """
        status = child.process.returncode
        attributes = self.study.trial(child.number).user_attrs
        if status in FROM_OUTSIDE:
            reason = "the sweep was stopped" if self.signal else f"its process was killed (status {status})"
            continued = self.study.interrupt(child.number, reason, killed=self.signal is None)
            self._say(child.chain, f"is interrupted, {reason}" + ("" if continued else ": too often, it failed"))
            return
        metrics = read_metrics(child.folder) if status == 0 else {}
        known = attributes.get(METRICS) or (sorted(metrics) if status == 0 else [])
        if known and self.study.objective not in known:
            self.study.interrupt(child.number, "the objective is none of its metrics", killed=False)
            raise self.study.unknown_objective(known)
        outcome = self._outcome(child, status, attributes.get(PRUNED), metrics)
        self.study.tell(child.number, outcome)
        seconds = time.monotonic() - child.began
        if outcome.state == TrialState.COMPLETE:
            best = self.study.best()
            is_best = best is not None and best.number == child.number
            self._say(
                child.chain,
                f"done in {seconds:.0f} s: {self.study.objective} {short(outcome.value)}"
                f"{', the best so far' if is_best else ''}",
            )
        elif outcome.state == TrialState.PRUNED:
            self._say(child.chain, f"{outcome.reason} and {seconds:.0f} s")
        else:
            self._say(child.chain, f"failed after {seconds:.0f} s: {outcome.reason} (see {child.folder / LOG})")

    def _outcome(self, child: Child, status: int, pruned: int | None, metrics: dict[str, float]) -> Outcome:
        if status != 0:
            return Outcome(TrialState.FAIL, reason=last_words(child.folder / LOG) or f"it ended with status {status}")
        if pruned is not None:
            return Outcome(TrialState.PRUNED, reason=f"pruned after {pruned} validation{'s' if pruned > 1 else ''}")
        value = float(metrics.get(self.study.objective, math.nan))
        if not math.isfinite(value):
            return Outcome(TrialState.FAIL, reason=f"{self.study.objective} is {value}")
        return Outcome(TrialState.COMPLETE, value)

    def _stop(self) -> None:
        """Let the trials save what they have, and wait for them."""
        if not self.children:
            return
        print(f"stopping {len(self.children)} trials, which save a checkpoint; Ctrl-C kills them", flush=True)
        for child in self.children:
            child.process.terminate()
        self.signal = self.signal or signal.SIGTERM
        asked, deadline = self._interrupts, time.monotonic() + PATIENCE
        while self.children:
            if self._interrupts > asked or time.monotonic() > deadline:
                for child in self.children:
                    kill(child)
            self._collect_stopped()
            time.sleep(PAUSE)

    def _collect_stopped(self) -> None:
        for child in [c for c in self.children if c.process.poll() is not None]:
            self.children.remove(child)
            try:
                self._finish(child)
            except OwlError as error:  # the reason for stopping, or a signal came first
                print(error)

    def _say(self, chain: int, message: str) -> None:
        print(f"trial {chain} {message}", flush=True)


def trial_name(plan: Plan, chain: int) -> str:
    """Return the name of a trial's run."""
    return f"{plan.name}/trial-{chain:04d}"


def short(value: object) -> str:
    """Four significant digits of a number, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else plain(value)  # type: ignore[arg-type]


def die_with(parent: int) -> Callable[[], None]:
    """Return what makes a new process receive SIGTERM when this one dies, however it dies."""

    def ask() -> None:
        assert LIBC is not None
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # died meanwhile
            os._exit(128 + signal.SIGTERM)

    return ask


def kill(child: Child) -> None:
    """Kill a trial with all processes that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(child.process.pid, signal.SIGKILL)
    child.process.wait()


def read_metrics(folder: Path) -> dict[str, float]:
    """Return the metrics of a run that has ended, none where there are none."""
    try:
        return json.loads((folder / "metrics.json").read_bytes())
    except (OSError, ValueError):
        return {}


def last_words(log: Path) -> str:
    """Return the last line that a process printed: its error."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("owl: error: ") if lines else ""
