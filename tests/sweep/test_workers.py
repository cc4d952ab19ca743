"""Workers: failures recorded, killed trials retried, trials stopped and continued."""

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from owl.sweep.plan import Plan
from owl.sweep.study import GRACE_PERIOD, chain_number
from owl.sweep.workers import Workers
from tests.helpers.errors import refused
from tests.helpers.ranks import RANKS
from tests.helpers.sweeps import load_study, plan_of, silence

TRIAL = """
import json, os, pathlib, signal, sys, time
folder, number, seconds, mark = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
(folder / "process").write_text(str(os.getpid()))
if mark == "crash": sys.exit("owl: error: the loss became nan at step 3")
if mark == "kill" and not (folder / "was_here").exists():
    (folder / "was_here").touch()
    os.kill(os.getpid(), signal.SIGKILL)
if mark == "busy" and not (folder / "was_here").exists():
    (folder / "was_here").touch()
    sys.exit("owl: error: process 1 is training in it; wait for it [run.busy]")
time.sleep(seconds)
metrics = {"val/psnr": 20.0 + number, "threads": os.environ.get("OMP_NUM_THREADS")}
(folder / "metrics.json").write_text(json.dumps(metrics))
"""
"""Writes what a run of fit writes for its worker, without the seconds that its imports take."""


class QuickWorkers(Workers):
    """Trials that behave as ``marks`` specifies for their chain."""

    def __init__(self, folder: Path, plan: Plan, count: int = 1, seconds: float = 0.0, **marks: str) -> None:
        self.seconds, self.marks = seconds, marks
        self.started: list[list[str]] = []
        sweep = load_study(folder, plan)
        super().__init__(sweep, folder, ["--config=a.yaml"], count, 3, "url", lambda: None)

    def command(self, number: int, chain: int, setting: dict[str, Any]) -> list[str]:
        self.started.append(super().command(number, chain, setting))
        mark = self.marks.get(f"trial_{chain}", "")
        return [
            sys.executable,
            "-c",
            TRIAL,
            str(self.runs / f"tried/trial-{chain:04d}"),
            str(number),
            str(self.seconds),
            mark,
        ]


def test_failures_are_recorded_and_killed_trials_are_retried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(trials=3)
    workers = QuickWorkers(tmp_path, plan, trial_0="crash", trial_1="kill")
    asyncio.run(workers.run())
    chains = workers.study.chains()
    assert [t.state for t in chains] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert chains[0].user_attrs["reason"] == "the loss became nan at step 3"
    assert [chain_number(t) for t in chains] == [0, 1, 3]
    first, second, again, last = workers.started
    for command in (first, again):  # a new trial has nothing to continue: its folder was emptied
        assert command[command.index("--ckpt_path") + 1] == "last"
    assert again[again.index("--name") + 1] == second[second.index("--name") + 1] == "tried/trial-0001"
    assert [word for word in again if "optimizer" in word] == [word for word in second if "optimizer" in word]
    assert "--trainer.callbacks.trial=2" in again
    assert json.loads((tmp_path / "tried/trial-0003/metrics.json").read_text())["threads"] == "3"
    told = capsys.readouterr().out
    assert "trial 0 failed" in told
    assert "trial 1 is interrupted, its process was killed (status -9)" in told
    assert "trial 1 continues" in told
    assert last[last.index("--name") + 1] == "tried/trial-0003"


def test_a_signal_stops_trials_and_the_next_worker_continues_them(tmp_path: Path) -> None:
    plan = plan_of(trials=2)
    workers = QuickWorkers(tmp_path, plan, count=2, seconds=60)
    command = workers.command

    def interrupt_the_second(number: int, chain: int, setting: dict[str, Any]) -> list[str]:
        if workers.processes:
            os.kill(os.getpid(), signal.SIGINT)
        return command(number, chain, setting)

    workers.command = interrupt_the_second  # type: ignore[method-assign]
    asyncio.run(workers.run())
    assert workers.signal == signal.SIGINT
    assert [t.state for t in workers.study.chains()] == [TrialState.WAITING] * 2
    assert not workers.processes
    following = QuickWorkers(tmp_path, plan, count=2)
    asyncio.run(following.run())
    assert [t.state for t in following.study.chains()] == [TrialState.COMPLETE] * 2
    assert [t.user_attrs.get("kills") for t in following.study.chains()] == [0, 0]  # a stop does not count as a kill


def test_a_metric_that_is_not_logged_stops_the_sweep_and_correcting_it_continues(tmp_path: Path) -> None:
    workers = QuickWorkers(tmp_path, plan_of(objective="psnr", trials=1))
    with refused("sweep.objective", "'psnr'", "did you mean 'val/psnr'?"):
        asyncio.run(workers.run())
    following = QuickWorkers(tmp_path, plan_of(trials=1))
    asyncio.run(following.run())
    assert following.study.best().value == 21.0
    assert "last" in following.started[0]


def work(folder: Path) -> None:
    """A worker whose trial does not end."""
    asyncio.run(QuickWorkers(folder, plan_of(trials=1), seconds=100).run())


def test_a_killed_workers_trial_ends_and_is_continued(tmp_path: Path) -> None:
    """The trial of a killed worker ends with it; the next worker continues it immediately."""
    worker: Any = RANKS.Process(target=work, args=(tmp_path,))
    worker.start()
    note, deadline = tmp_path / "tried" / "trial-0000" / "process", time.monotonic() + 200
    while not note.exists() or not note.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    worker.kill()
    worker.join()
    trial = [psutil.Process(int(note.read_text()))] if psutil.pid_exists(int(note.read_text())) else []
    assert not psutil.wait_procs(trial, timeout=50)[1]
    workers = QuickWorkers(tmp_path, plan_of(trials=1))
    silence(workers.study, 0, GRACE_PERIOD + 1)
    asyncio.run(workers.run())
    (chain,) = workers.study.chains()
    assert chain.state == TrialState.COMPLETE
    assert chain.system_attrs["retry_history"] == [0]


def test_a_worker_without_heartbeats_leaves_its_trial_to_the_worker_that_continued_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("owl.sweep.workers.HEARTBEAT_INTERVAL", 0)
    workers = QuickWorkers(tmp_path, plan_of(trials=1), seconds=100)
    other = QuickWorkers(tmp_path, plan_of(trials=1))
    processes, beat = [], workers.study.record_heartbeat

    def beat_too_late(number: int) -> bool:
        processes.extend(workers.processes)
        silence(workers.study, number, GRACE_PERIOD + 1)
        other.study.retry_interrupted()
        return beat(number)

    workers.study.record_heartbeat = beat_too_late  # type: ignore[method-assign]
    asyncio.run(workers._run_trial(*workers.study.ask()))
    assert not workers.processes
    assert [process.returncode for process in processes] == [-signal.SIGKILL]
    asyncio.run(other.run())
    assert [t.state for t in workers.study.chains()] == [TrialState.COMPLETE]


def test_a_locked_folder_and_an_unavailable_storage_lose_no_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The interrupted process may still be saving; the database may be restarting."""
    workers = QuickWorkers(tmp_path, plan_of(trials=1), trial_0="busy")
    tell, errors = workers.study.tell, iter([StorageInternalError("the server closed the connection")])

    def tell_unless_unavailable(*arguments: Any, **attributes: Any) -> None:
        if error := next(errors, None):
            raise error from error
        tell(*arguments, **attributes)

    workers.study.tell = tell_unless_unavailable  # type: ignore[method-assign]
    asyncio.run(workers.run())
    (chain,) = workers.study.chains()
    assert (chain.state, chain.user_attrs["kills"]) == (TrialState.COMPLETE, 0)
    assert "retrying" in capsys.readouterr().out
