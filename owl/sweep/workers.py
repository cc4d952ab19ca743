"""Run trials, each as a separate process of ``fit``, monitored by the worker."""

import asyncio
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from owl.process import kill, start
from owl.sweep.plan import Setting, options, short
from owl.sweep.study import HEARTBEAT_INTERVAL, METRICS, PRUNED, STOPPED, SweepStudy, chain_number, unknown_objective

LOG = "log.txt"
PRUNING = "owl.callbacks.pruning.Pruning"
POLL_INTERVAL = 0.2  # seconds between polls of a trial's process
RETRY_INTERVAL = 1.0  # seconds between queries of the storage
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""From the user; from a cluster on preemption, and before a time limit."""
INTERRUPTED = {
    *(-number for number in (signal.SIGKILL, signal.SIGHUP, *STOP_SIGNALS)),
    *(128 + number for number in STOP_SIGNALS),
}
"""Exit statuses of a trial that was ended by the user, by the system for lack of memory, or by a cluster."""
BUSY = "[run.busy]"  # ends the output of a trial if the process that it continues still holds the run folder


@dataclass
class Workers:
    """Run the trials of a sweep until all trials, including those of other workers, have ended or a signal arrives.

    After a signal, trials save a checkpoint and can be continued by another worker. A second SIGINT kills them. If
    this process is killed, its trials also end (on Linux), and another worker continues them.
    """

    study: SweepStudy
    runs: Path  # holds the run folders
    arguments: list[str]  # of fit, for the experiment
    count: int  # trials at the same time
    threads: int | None  # OpenMP threads of each trial; None keeps the default of the libraries
    storage: str  # URL of the study, for the trials
    report: Callable[[], object]  # called after each trial
    processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    signal: int | None = None  # the received one
    killing: bool = False  # since a second SIGINT

    async def run(self) -> None:
        """Run trials until the sweep is done or a signal arrives.

        Raises:
            OwlError: A trial does not log the objective.
        """
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._stop, number)
        workers = (self._run_worker() for _ in range(self.count))
        for error in await asyncio.gather(*workers, return_exceptions=True):
            if error is not None:
                raise error

    def _stop(self, number: int) -> None:
        """Let the trials save a checkpoint and end; a second SIGINT kills them."""
        if self.signal is None:
            print(f"stopping {len(self.processes)} trials, which save a checkpoint; Ctrl-C kills them", flush=True)
        self.killing |= self.signal is not None and number == signal.SIGINT
        for process in self.processes:
            if self.killing:
                kill(process)
            elif self.signal is None:
                process.terminate()
        if not (self.signal == signal.SIGUSR1 and number == signal.SIGTERM):  # the end that SIGUSR1 has announced
            self.signal = number

    async def _run_worker(self) -> None:
        """Run one trial after the other until none is left, here or for other workers."""
        try:
            while self.signal is None:
                await self._retry(self.study.retry_interrupted)
                if trial := await self._retry(self.study.ask):
                    await self._run_trial(*trial)
                elif all(trial.state.is_finished() for trial in await self._retry(self.study.chains)):
                    return
                else:
                    await asyncio.sleep(RETRY_INTERVAL)
        except Exception:
            self._stop(signal.SIGTERM)
            raise

    async def _retry(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function again while the database is unavailable; trials continue training."""
        while True:
            try:
                return call(*arguments)
            except StorageInternalError as error:
                if self.killing:
                    raise KeyboardInterrupt from error
                print(f"the database is unavailable, retrying: {' '.join(str(error.__cause__).split())}", flush=True)
            await asyncio.sleep(RETRY_INTERVAL)

    async def _run_trial(self, number: int, setting: Setting) -> None:
        """Run a trial and record its result, unless another worker takes it over."""
        chain = chain_number(self.study.trial(number))
        folder = self.runs / self.study.plan.name / trial_name(chain)
        if chain == number:  # a folder left by an older sweep of the same name is not continued
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        process = start(self.command(number, chain, setting), folder / LOG, self.threads)
        self.processes.add(process)
        params = ", ".join(f"{key.rpartition('.')[2]} {short(value)}" for key, value in setting.items())
        print(f"trial {chain} {'starts' if chain == number else 'continues'}: {params}", flush=True)
        started = last_heartbeat = time.monotonic()
        while process.poll() is None:
            await asyncio.sleep(POLL_INTERVAL)
            if time.monotonic() - last_heartbeat > HEARTBEAT_INTERVAL:
                if not await self._retry(self.study.record_heartbeat, number):
                    kill(process)  # this process recorded no heartbeat for so long that the trial counts as killed
                last_heartbeat = time.monotonic()
        self.processes.remove(process)
        message = await self._retry(self._record_result, number, process.returncode, folder)
        print(f"trial {chain} {message}, after {time.monotonic() - started:.0f} s", flush=True)
        await self._retry(self.study.retry_interrupted)
        await self._retry(self.report)

    def command(self, number: int, chain: int, setting: Setting) -> list[str]:
        """Return the command line of a trial."""
        name = self.study.plan.name
        callback = {"storage": self.storage, "study": name, "trial": number}
        return [
            *(sys.executable, "-m", "owl", "fit", *self.arguments, *options(setting)),
            *("--runs", str(self.runs), "--name", f"{name}/{trial_name(chain)}", "--ckpt_path", "last"),
            f"--trainer.callbacks+={PRUNING}",
            *(f"--trainer.callbacks.{key}={value}" for key, value in callback.items()),
        ]

    def _record_result(self, number: int, status: int, folder: Path) -> str:
        """Record the result of a trial whose process has ended, and describe it."""
        trial, objective, file = self.study.trial(number), self.study.plan.objective, folder / "metrics.json"
        metrics = json.loads(file.read_bytes()) if status == 0 and file.exists() else {}
        known, value = trial.user_attrs.get(METRICS, sorted(metrics)), float(metrics.get(objective, math.nan))
        output = (folder / LOG).read_text("utf-8", "replace").strip().rpartition("\n")[2].removeprefix("owl: error: ")
        if trial.state != TrialState.RUNNING:
            return "was taken over by another worker"
        if known and objective not in known:
            self.study.tell(number, TrialState.FAIL, stopped=True)
            raise unknown_objective(objective, known)
        if status in INTERRUPTED or (status and output.endswith(BUSY)):
            is_kill = self.signal is None and status in INTERRUPTED
            self.study.tell(number, TrialState.FAIL, **({} if is_kill else {STOPPED: True}))
            why = f"its process was killed (status {status})" if self.signal is None else "the sweep was stopped"
            return f"is interrupted, {why}"
        if status == 0 and PRUNED in trial.user_attrs:
            self.study.tell(number, TrialState.PRUNED)
            return f"pruned at validation {trial.user_attrs[PRUNED]}"
        if math.isfinite(value):
            self.study.tell(number, TrialState.COMPLETE, value)
            best = self.study.best()
            return f"done: {objective} {short(value)}{', the best so far' if best and best.number == number else ''}"
        reason = f"{objective} is {value}" if status == 0 else output or f"it ended with status {status}"
        self.study.tell(number, TrialState.FAIL, reason=reason)
        return f"failed: {reason} (see {folder / LOG})"


def trial_name(chain: int) -> str:
    """Return the name of a trial's run folder in the sweep's folder."""
    return f"trial-{chain:04d}"
