"""The study that all workers of a sweep share: where it is stored, who works on which trial, what became of it."""

import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from owl.errors import OwlError
from owl.sweep.plan import PRUNERS, Plan, Setting, make
from owl.sweep.reading import nearest

JOURNAL = "journal.log"
SILENCE = 180.0
"""Seconds without a sign of life after which a worker on another machine counts as lost."""
MOST_KILLS = 2
"""How often a trial is tried again whose process was killed: after that it may be the killer, by its hunger."""

IDENTITY, PRUNER, EXPERIMENT = "identity", "pruner", "experiment"  # attributes of the study
LEASE, REASON, PRUNED, KILLS, METRICS, SURPLUS = "lease", "reason", "pruned", "kills", "metrics", "surplus"


def storage_address(plan: Plan, folder: Path) -> str:
    """Return where a sweep's study is: a SQL URL as the plan gives it, or the path of a journal in its folder."""
    return plan.storage or str((folder / JOURNAL).absolute())


def is_url(address: str) -> bool:
    """Whether a study is in a database rather than in a journal file."""
    return "://" in address


def open_storage(address: str) -> BaseStorage:
    """Open a storage.

    Args:
        address: SQL URL, in which ``$NAME`` stands for an environment variable (so that no password need be written
            down), or the absolute path of a journal file.

    Raises:
        OwlError: It cannot be reached, or its driver is not installed.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not is_url(address):
        Path(address).parent.mkdir(parents=True, exist_ok=True)
        # The lock that Optuna takes by default is a link, whose age is that of the file it leads to: where the path
        # differs between machines it could not be told to be left behind by a dead process.
        return JournalStorage(JournalFileBackend(address, JournalFileOpenLock(address)))
    try:
        return RDBStorage(os.path.expandvars(address))
    except Exception as error:  # SQLAlchemy and each driver have their own
        reason = " ".join(str(error).split())[:300]
        raise OwlError(
            "sweep.storage",
            f"the storage {address} cannot be opened ({reason}); give a URL of SQLAlchemy whose driver is installed, "
            "or leave it out for a journal file in the sweep's folder",
        ) from error


@dataclass(frozen=True)
class Member:
    """A process, told from later ones with the same number."""

    pid: int
    started: float

    @classmethod
    def of(cls, pid: int) -> "Member":
        """Describe a process that is running."""
        return cls(pid, birth(pid))

    def alive(self) -> bool:
        """Whether it is still running, on this machine."""
        try:
            return birth(self.pid) == self.started and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def birth(pid: int) -> float:
    """When a process began: on Linux by the clock that nobody sets, in ticks since the machine's start.

    Raises:
        psutil.NoSuchProcess: There is none.
    """
    if sys.platform != "linux":
        return psutil.Process(pid).create_time()
    try:
        return float(Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[19])
    except OSError as error:
        raise psutil.NoSuchProcess(pid) from error


def place() -> str:
    """Name what process numbers are valid in: this machine, or this container."""
    namespace = "/proc/self/ns/pid"
    return f"{socket.gethostname()} {os.readlink(namespace) if os.path.exists(namespace) else ''}".strip()


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: what the study is told."""

    state: TrialState
    value: float | None = None
    reason: str = ""


class SweepStudy:
    """A sweep's study with the few operations that its workers need, each safe while others do the same.

    A *chain* is a trial with those that continue it after an interruption. It counts as one trial, and is called by
    the number of the first, which is that of its run folder.

    Args:
        storage: Where it is.
        name: Of the sweep.

    Raises:
        KeyError: The storage has no such study.
    """

    def __init__(self, storage: BaseStorage, name: str) -> None:
        self.storage = storage
        self.study = optuna.load_study(storage=storage, study_name=name, sampler=optuna.samplers.RandomSampler())
        self._id = storage.get_study_id_from_name(name)

    @classmethod
    def begin(cls, storage: BaseStorage, plan: Plan, experiment: list[str], check: Callable[[], None]) -> "SweepStudy":
        """Open a plan's study, or begin it.

        Args:
            storage: Where it is.
            plan: The sweep.
            experiment: What tells the experiment from another one.
            check: Called before the study is begun, or changed.

        Raises:
            OwlError: The study was begun with another plan or experiment.
        """
        try:
            found = cls(storage, plan.name)
        except KeyError:
            check()
            try:
                study = optuna.create_study(storage=storage, study_name=plan.name, direction=plan.direction)
                study.set_user_attr(EXPERIMENT, experiment)
                study.set_user_attr(IDENTITY, plan.identity())
            except DuplicatedStudyError:
                pass  # by another worker, a moment ago
            found = cls(storage, plan.name)
        else:
            found.refuse_other(plan, experiment, check)
        found.study.set_user_attr(PRUNER, plan.pruner)
        return found

    def refuse_other(self, plan: Plan, experiment: list[str], check: Callable[[], None]) -> None:
        """Let a plan change only while no trial has a result.

        Raises:
            OwlError: It is another one, and there are results.
        """
        before, now = self.study.user_attrs.get(IDENTITY), plan.identity()
        if before is None:  # another worker has just begun it
            return
        changed = [key for key in now if before.get(key) != now[key]]
        if self.study.user_attrs.get(EXPERIMENT) not in (None, experiment):
            changed.append("experiment")
        if not changed:
            return
        has_results = any(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in self.study.trials)
        if has_results or "direction" in changed:
            raise OwlError(
                "sweep.other-plan",
                f"the sweep '{plan.name}' was begun with another {' and '.join(changed)}, whose results do not "
                "compare; give the changed one another name",
            )
        check()
        self.study.set_user_attr(IDENTITY, now)
        self.study.set_user_attr(EXPERIMENT, experiment)

    @cached_property
    def maximizes(self) -> bool:
        """Whether more is better."""
        return self.study.direction == optuna.study.StudyDirection.MAXIMIZE

    @property
    def objective(self) -> str:
        """The metric that decides."""
        return str(self.study.user_attrs[IDENTITY]["objective"])

    # ----------------------------------------------------------------- trials

    def trial(self, number: int) -> FrozenTrial:
        """Return a trial as it stands."""
        return self.storage.get_trial(self.storage.get_trial_id_from_study_id_trial_number(self._id, number))

    def note(self, number: int, key: str, value: Any) -> None:
        """Write an attribute of a trial."""
        identity = self.storage.get_trial_id_from_study_id_trial_number(self._id, number)
        self.storage.set_trial_user_attr(identity, key, value)

    def chains(self) -> list[FrozenTrial]:
        """Return the last trial of every chain, in the order in which the chains began."""
        last = {chain_number(t): t for t in self.study.trials if SURPLUS not in t.user_attrs}
        return [last[number] for number in sorted(last)]

    def report(self, number: int, step: int, value: float) -> None:
        """Store the objective of a running trial after its n-th validation, from 1; the first report of each counts."""
        trial = self.trial(number)
        if step not in trial.intermediate_values:
            identity = self.storage.get_trial_id_from_study_id_trial_number(self._id, number)
            self.storage.set_trial_intermediate_value(identity, step, value)

    def best(self) -> FrozenTrial | None:
        """Return the complete trial with the best value, if there is one."""
        complete = [t for t in self.chains() if t.state == TrialState.COMPLETE]
        return max(complete, key=lambda t: value_of(t) if self.maximizes else -value_of(t), default=None)

    def claim(self, plan: Plan) -> tuple[int, Setting] | None:
        """Take the next trial: one that waits to be continued, or a new one.

        Returns:
            Its number and its setting; None where there is nothing left to begin.
        """
        chains = self.chains()
        if len(chains) >= plan.trials and not any(t.state == TrialState.WAITING for t in chains):
            return None
        self.study.sampler = plan.make_sampler(len(chains))
        trial = self.study.ask()
        # Another worker may have begun the last one in this very moment. Numbers are given one by one, so that all
        # agree on which trial is one too many.
        earlier = [t for t in self.chains() if chain_number(t) < chain_number(self.trial(trial.number))]
        if len(earlier) >= plan.trials:
            trial.set_user_attr(SURPLUS, True)
            self.tell(trial.number, Outcome(TrialState.FAIL))
            return None
        # The lease comes before the values: a trial without one cannot be told to be lost.
        self.renew(trial.number, None)
        return trial.number, plan.draw(trial)

    def tell(self, number: int, outcome: Outcome) -> bool:
        """Record how a trial ended; returns False where another worker has already done so."""
        if outcome.reason:
            self.note_if_running(number, REASON, outcome.reason)
        try:
            self.study.tell(number, outcome.value, outcome.state)
        except (UpdateFinishedTrialError, ValueError):
            return False
        except RuntimeError:  # the grid's sampler, which wants to end the loop of study.optimize
            return True
        return True

    def note_if_running(self, number: int, key: str, value: Any) -> None:
        """Write an attribute of a trial unless it has ended."""
        with suppress(UpdateFinishedTrialError):
            self.note(number, key, value)

    def interrupt(self, number: int, reason: str, killed: bool) -> bool:
        """End a trial that was cut off and let a new one continue it.

        Args:
            number: The trial.
            reason: For the report.
            killed: Whether this counts towards `MOST_KILLS`.

        Returns:
            False where it is not continued, since it was killed too often.
        """
        trial = deepcopy(self.trial(number))
        kills = trial.user_attrs.get(KILLS, 0) + int(killed)
        gives_up = kills > MOST_KILLS
        if not self.tell(number, Outcome(TrialState.FAIL, reason=reason)):
            return True  # by someone else, who lets it be continued
        if gives_up:
            return False
        trial.user_attrs = {KILLS: kills}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            # its own bookkeeping (what the samplers and pruners remember of the trial) is the library's
            RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)(self.study, trial)
        return True

    # ----------------------------------------------------------------- leases

    def renew(self, number: int, child: int | None) -> bool:
        """Say that this process works on a trial; returns False where it has ended meanwhile.

        Args:
            number: The trial.
            child: Number of the process that trains.
        """
        if self.trial(number).state != TrialState.RUNNING:
            return False
        members = [Member.of(os.getpid())]
        if child is not None and psutil.pid_exists(child):
            members.append(Member.of(child))
        lease = {"place": place(), "members": [[m.pid, m.started] for m in members], "time": time.time()}
        self.note_if_running(number, LEASE, lease)
        return True

    def lost(self) -> list[FrozenTrial]:
        """Return the trials that no living worker works on."""
        return [t for t in self.study.trials if t.state == TrialState.RUNNING and is_lost(t, time.time())]

    def unknown_objective(self, known: list[str]) -> OwlError:
        """Return what is told where the objective is not among the metrics."""
        return OwlError(
            "sweep.objective",
            f"the objective '{self.objective}' is none of the metrics that the first trial logged"
            f"{nearest(self.objective, known)} (they are: {', '.join(known)}); correct it in the sweep's YAML and run "
            "the same command again",
        )


def is_lost(trial: FrozenTrial, now: float) -> bool:
    """Whether the worker of a running trial is gone: its processes here have ended, or those elsewhere are silent."""
    lease = trial.user_attrs.get(LEASE)
    begun = trial.datetime_start.timestamp() if trial.datetime_start else now
    if lease is None:
        return now - begun > SILENCE
    if now - lease["time"] > SILENCE:
        return True
    return lease["place"] == place() and not any(Member(*m).alive() for m in lease["members"])


def value_of(trial: FrozenTrial) -> float:
    """Return the objective of a trial that has one."""
    assert trial.value is not None
    return trial.value


def chain_number(trial: FrozenTrial) -> int:
    """Return the number of the trial that a trial continues, through all interruptions; its own where it is new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        first = RetryHeartbeatStaleTrialCallback.retried_trial_number(trial)
    return trial.number if first is None else first


def pruner_of(study: optuna.Study) -> optuna.pruners.BasePruner:
    """Build the pruner that the sweep of a study has chosen."""
    return make(PRUNERS, study.user_attrs[PRUNER])
