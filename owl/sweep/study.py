"""The study shared by all workers of a sweep: its trials, their workers and their results."""

import os
import random
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy import event, exc

from owl.errors import OwlError, suggestion
from owl.sweep.plan import Plan, Setting

HEARTBEAT = 15
"""Seconds between heartbeats of a trial's worker."""
GRACE = 90
"""Seconds without a heartbeat after which a worker counts as killed."""
MOST_KILLS = 2
"""Largest number of kills after which a trial is continued; after more, the trial itself may be the cause."""
PATIENCE = 60
"""Seconds that a process waits for the lock of SQLite."""
ATTEMPTS = 5
"""Attempts to open a database: if several processes create its tables at the same time, all but one fail."""
NETWORKS = ("nfs", "cifs", "smb", "lustre", "beegfs", "gpfs", "ceph", "fuse.")
"""Prefixes of types of network file systems, whose locks may not work between machines."""

IDENTITY, PRUNER = "identity", "pruner"
"""Attributes of the study: its identity, and the values read by the trials' processes."""
STOPPED, KILLS, REASON = "stopped", "kills", "reason"
"""Attributes of a trial: its worker had to stop it; number of earlier kills; reason of the final failure."""
PRUNED, METRICS = "pruned", "metrics"
"""Attributes set by its process: the validation after which it was pruned; its metrics if the objective is missing."""


def open_storage(url: str) -> RDBStorage:
    """Open a database, and create its tables if it has none.

    Args:
        url: URL of SQLAlchemy; ``$NAME`` is replaced by the environment variable, so that no password is stored.

    Raises:
        OwlError: The database cannot be reached, or its driver is not installed.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    is_sqlite = url.startswith("sqlite")
    settings: dict[str, Any] = {"connect_args": {"timeout": PATIENCE}} if is_sqlite else {"pool_pre_ping": True}
    for attempt in range(1, ATTEMPTS + 1):
        try:
            storage = RDBStorage(os.path.expandvars(url), settings, heartbeat_interval=HEARTBEAT, grace_period=GRACE)
            break
        except Exception as error:  # each driver has its own types
            if isinstance(error, exc.DBAPIError) and attempt < ATTEMPTS:
                time.sleep(random.random())
                continue
            raise OwlError(
                "sweep.storage",
                f"the storage {url} cannot be opened ({' '.join(str(error).split())[:300]}); give a URL of SQLAlchemy "
                "whose driver is installed, or leave it out for SQLite in the sweep's folder",
            ) from error
    if is_sqlite:
        # Python's driver starts a transaction at the first write, after Optuna has checked that a trial is free: two
        # workers would claim the same trial. From https://docs.sqlalchemy.org/en/20/dialects/sqlite.html
        storage.engine.dispose()
        event.listen(storage.engine, "connect", lambda raw, _: setattr(raw, "isolation_level", None))
        event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


def network_of(folder: Path) -> str | None:
    """Return the type of the network file system of a folder, which need not exist; None for a local file system."""
    kinds = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    kind = next((kinds[path] for path in (folder.resolve(), *folder.resolve().parents) if path in kinds), "")
    return kind if kind.startswith(NETWORKS) else None


class SweepStudy:
    """The study of a sweep with the operations of its workers, all of which are safe to call concurrently.

    A *chain* is a trial and the trials that continue it after interruptions. It counts as one trial. Its number is the
    number of its first trial, which is also the number of its run folder.

    Args:
        storage: Storage of the study.
        plan: The sweep.

    Raises:
        KeyError: The storage does not contain the study.
    """

    def __init__(self, storage: RDBStorage, plan: Plan) -> None:
        self.storage, self.plan = storage, plan
        self.study = optuna.load_study(storage=storage, study_name=plan.name)
        self._id = storage.get_study_id_from_name(plan.name)

    @classmethod
    def begin(cls, storage: RDBStorage, plan: Plan, experiment: list[str], check: Callable[[], None]) -> "SweepStudy":
        """Open or create the study of a plan; the plan may change while no trial has a result.

        Args:
            storage: Storage of the study.
            plan: The sweep.
            experiment: Identity of the experiment.
            check: Called before the study is created or changed.

        Raises:
            OwlError: The study has results of another plan or experiment.
        """
        now = {**plan.identity(), "experiment": experiment}
        if plan.name not in optuna.get_all_study_names(storage):
            check()
        study = optuna.create_study(
            storage=storage, study_name=plan.name, direction=plan.direction, load_if_exists=True
        )
        before = study.user_attrs.get(IDENTITY, now)
        if changed := [key for key in now if before[key] != now[key]]:
            has_results = any(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in study.trials)
            if has_results or "direction" in changed:
                raise OwlError(
                    "sweep.other-plan",
                    f"the sweep '{plan.name}' was begun with another {' and '.join(changed)}, whose results do not "
                    "compare; give the changed one another name",
                )
            check()
        study.set_user_attr(IDENTITY, now)
        study.set_user_attr(PRUNER, plan.pruner)
        return cls(storage, plan)

    def attempts(self) -> list[FrozenTrial]:
        """Return all trials that count.

        Two workers may add the last trial of the sweep, or continue the same trial, at the same time. Trial numbers are
        consecutive, so all workers agree that only the first counts.
        """
        trials = self.study.trials
        chains = [t.number for t in trials if not history(t)][: self.plan.trials]
        first: dict[tuple[int, ...], FrozenTrial] = {}
        for trial in trials:
            if chain_number(trial) in chains:
                first.setdefault((*history(trial),) or (-1, trial.number), trial)
        return list(first.values())

    def chains(self) -> list[FrozenTrial]:
        """Return the last trial of every chain, in the order of the chains' numbers."""
        last = {chain_number(t): t for t in self.attempts()}
        return [last[number] for number in sorted(last)]

    def best(self) -> FrozenTrial | None:
        """Return the complete trial with the best value, if there is one."""
        sign = 1 if self.plan.direction == "maximize" else -1
        complete = [t for t in self.chains() if t.state == TrialState.COMPLETE]
        return max(complete, key=lambda t: sign * t.values[0], default=None)

    def trial(self, number: int) -> FrozenTrial:
        """Return the current state of a trial."""
        return self.storage.get_trial(self.trial_id(number))

    def trial_id(self, number: int) -> int:
        """Return the storage's ID of a trial."""
        return self.storage.get_trial_id_from_study_id_trial_number(self._id, number)

    def claim(self) -> tuple[int, Setting] | None:
        """Claim the next trial: a waiting trial that continues another one, or a new trial.

        Returns:
            Its number and its setting; None if no trials are left.
        """
        while True:
            chains = self.chains()
            for waiting in (t for t in chains if t.state == TrialState.WAITING):
                identity = self.trial_id(waiting.number)
                self.storage.record_heartbeat(identity)  # first: a trial without any heartbeat never counts as killed
                with suppress(UpdateFinishedTrialError):
                    if self.storage.set_trial_state_values(identity, TrialState.RUNNING):
                        self.study.sampler = self.plan.make_sampler(waiting.number)
                        return waiting.number, self.plan.draw(Trial(self.study, identity))
            if len(chains) >= self.plan.trials:
                return None
            self.study.add_trial(create_trial(state=TrialState.WAITING))

    def beat(self, number: int) -> bool:
        """Record a heartbeat for a trial; return False if it has ended meanwhile."""
        self.storage.record_heartbeat(self.trial_id(number))
        return self.trial(number).state == TrialState.RUNNING

    def tell(self, number: int, state: TrialState, value: float | None = None, **attributes: Any) -> None:
        """Record the result of a trial, unless it has ended; a failure without a `REASON` is an interruption."""
        with suppress(UpdateFinishedTrialError, ValueError, RuntimeError):  # the last: the grid ends Optuna's own loop
            for key, note in attributes.items():
                self.storage.set_trial_user_attr(self.trial_id(number), key, note)
            self.study.tell(number, value, state)

    def revive(self) -> None:
        """Enqueue interrupted trials again, including those of workers without recent heartbeats.

        The trials are found by their state. A callback of the storage, which runs after a trial is marked as failed,
        would lose the trial if its process were killed in between.
        """
        optuna.storages.fail_stale_trials(self.study)
        attempts = self.attempts()
        continued = {number for trial in attempts for number in history(trial)}
        for trial in attempts:
            if trial.state == TrialState.FAIL and REASON not in trial.user_attrs and trial.number not in continued:
                trial.user_attrs = {KILLS: trial.user_attrs.get(KILLS, 0) + (STOPPED not in trial.user_attrs)}
                if trial.user_attrs[KILLS] <= MOST_KILLS:
                    RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)(self.study, trial)


def history(trial: FrozenTrial) -> list[int]:
    """Return the numbers of the trials that a trial continues."""
    return RetryHeartbeatStaleTrialCallback.retry_history(trial)


def chain_number(trial: FrozenTrial) -> int:
    """Return the number of the first trial of a trial's chain."""
    return (history(trial) or [trial.number])[0]


def unknown_objective(objective: str, known: list[str]) -> OwlError:
    """Return the error for an objective that is not among the metrics."""
    return OwlError(
        "sweep.objective",
        f"the objective '{objective}' is none of the metrics that the first trial logged{suggestion(objective, known)} "
        f"(they are: {', '.join(known)}); correct it in the sweep's YAML and run the same command again",
    )
