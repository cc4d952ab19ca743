"""The study shared by all workers of a sweep: its trials, their workers and their results."""

import os
import random
import time
import warnings
from contextlib import suppress
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages import RetryHeartbeatStaleTrialCallback as Retry
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import event, exc

from owl.errors import OwlError, suggestion
from owl.sweep.plan import Plan, Setting, make

HEARTBEAT_INTERVAL = 15  # seconds between heartbeats of a trial's worker
GRACE_PERIOD = 90  # seconds without a heartbeat after which a worker counts as killed
MAX_RETRIES = 2  # of a killed trial; after more kills, the trial itself may be the cause
LOCK_TIMEOUT = 60  # seconds that a process waits for the lock of SQLite
MAX_ATTEMPTS = 5  # to open a database: if several processes create its tables at the same time, all but one fail

IDENTITY, PRUNER = "identity", "pruner"  # attributes of the study
STOPPED, KILLS, REASON = "stopped", "kills", "reason"  # of a trial: whether and how often it was ended, why it failed
PRUNED, METRICS = "pruned", "metrics"  # set by its process: the last validation; what it logs instead of the objective


def open_storage(url: str, attempts: int = MAX_ATTEMPTS) -> RDBStorage:
    """Open a database, and create its tables if it has none.

    Args:
        url: URL of SQLAlchemy; ``$NAME`` is replaced by the environment variable, so that no password is stored.

    Raises:
        OwlError: The database cannot be reached, or its driver is not installed.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    is_sqlite = url.startswith("sqlite")
    sqlite: dict[str, Any] = {"connect_args": {"timeout": LOCK_TIMEOUT, "isolation_level": None}}
    settings = sqlite if is_sqlite else {"pool_pre_ping": True}
    try:
        storage = RDBStorage(
            os.path.expandvars(url), settings, heartbeat_interval=HEARTBEAT_INTERVAL, grace_period=GRACE_PERIOD
        )
    except Exception as error:  # each driver has its own types
        if isinstance(error, exc.DBAPIError) and attempts > 1:
            time.sleep(random.random())
            return open_storage(url, attempts - 1)
        raise OwlError(
            "sweep.storage",
            f"the storage {url} cannot be opened ({' '.join(str(error).split())[:300]}); give a URL of SQLAlchemy "
            "whose driver is installed, or leave it out for SQLite in the sweep's folder",
        ) from error
    if is_sqlite:
        # Python's driver would start a transaction at the first write, after Optuna has checked that a trial is free:
        # two workers would start it. From https://docs.sqlalchemy.org/en/20/dialects/sqlite.html
        event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


class SweepStudy:
    """The study of a sweep with the operations of its workers, all of which are safe to call concurrently.

    A *chain* is a trial and the trials that continue it after interruptions. It counts as one trial. Its number is the
    number of its first trial, which is also the number of its run folder.

    Raises:
        KeyError: The storage does not contain the study.
    """

    def __init__(self, storage: RDBStorage, plan: Plan) -> None:
        self.storage, self.plan = storage, plan
        self.study = optuna.load_study(storage=storage, study_name=plan.name)

    @classmethod
    def load_or_create(cls, storage: RDBStorage, plan: Plan, experiment: list[str]) -> "SweepStudy":
        """Open or create the study of a plan and an experiment; they may change while no trial has a result.

        Raises:
            OwlError: The study has results of another plan or experiment.
        """
        optuna.create_study(storage=storage, study_name=plan.name, direction=plan.direction, load_if_exists=True)
        sweep = cls(storage, plan)
        space = {key: f"{p.distribution} when {p.when}" for key, p in plan.space.items()}
        now = {"objective": plan.objective, "direction": plan.direction, "space": space, "experiment": experiment}
        before = sweep.study.user_attrs.get(IDENTITY, now)
        changed = [key for key in now if before[key] != now[key]]
        has_results = bool(sweep.study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))
        if "direction" in changed or (changed and has_results):
            raise OwlError(
                "sweep.other-plan",
                f"the sweep '{plan.name}' was started with another {' and '.join(changed)}, whose results do not "
                "compare; give the changed one another name",
            )
        sweep.study.set_user_attr(IDENTITY, now)
        sweep.study.set_user_attr(PRUNER, plan.pruner)
        return sweep

    def chains(self) -> list[FrozenTrial]:
        """Return the last trial of every chain, in the order of the chains' numbers.

        Two workers may add the last trial of the sweep, or continue the same trial, at the same time. Trial numbers are
        consecutive, so all workers agree that only the first counts.
        """
        last: dict[int, FrozenTrial] = {}
        for trial in self.study.trials:
            chain, earlier = chain_number(trial), Retry.retry_history(trial)
            continues = chain in last and earlier[-1:] == [last[chain].number]
            if continues or (not earlier and len(last) < self.plan.trials):
                last[chain] = trial
        return list(last.values())

    def best(self) -> FrozenTrial | None:
        """Return the complete trial with the best value, if there is one."""
        return self.study.best_trial if self.study.get_trials(states=(TrialState.COMPLETE,)) else None

    def trial(self, number: int) -> FrozenTrial:
        """Return the current state of a trial."""
        return self.study.trials[number]

    def trial_id(self, number: int) -> int:
        """Return the storage's ID of a trial."""
        study = self.storage.get_study_id_from_name(self.plan.name)
        return self.storage.get_trial_id_from_study_id_trial_number(study, number)

    def ask(self) -> tuple[int, Setting] | None:
        """Start the next trial: a waiting trial that continues another one, or a new trial.

        Returns:
            Its number and its setting; None if no trials are left.
        """
        while True:
            chains = self.chains()
            for waiting in (t for t in chains if t.state == TrialState.WAITING):
                trial_id = self.trial_id(waiting.number)
                self.storage.record_heartbeat(trial_id)  # first: a trial without any heartbeat never counts as killed
                with suppress(UpdateFinishedTrialError):
                    if self.storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                        # a new seed for each trial: with the same one, a newly created sampler repeats its samples
                        seed = (self.plan.seed * 1_000_003 + waiting.number) % 2**32
                        self.study.sampler = make("sampler", self.plan.sampler, seed=seed)
                        return waiting.number, self.plan.suggest(Trial(self.study, trial_id))
            if len(chains) >= self.plan.trials:
                return None
            self.study.enqueue_trial({})

    def record_heartbeat(self, number: int) -> bool:
        """Record a heartbeat for a trial; return False if it has finished."""
        self.storage.record_heartbeat(self.trial_id(number))
        return self.trial(number).state == TrialState.RUNNING

    def tell(self, number: int, state: TrialState, value: float | None = None, **attributes: Any) -> None:
        """Record the result of a trial, unless it is finished; a failure without a `REASON` is an interruption."""
        with suppress(RuntimeError):  # it is finished, or the grid ends Optuna's own loop
            for key, note in attributes.items():
                self.storage.set_trial_user_attr(self.trial_id(number), key, note)
            self.study.tell(number, value, state, skip_if_finished=True)

    def retry_interrupted(self) -> None:
        """Enqueue interrupted trials again, including those of workers without recent heartbeats.

        The trials are found by their state. A callback of the storage, which runs after a trial is marked as failed,
        would lose the trial if its process were killed in between.
        """
        optuna.storages.fail_stale_trials(self.study)
        for trial in self.chains():
            if trial.state == TrialState.FAIL and REASON not in trial.user_attrs:
                trial.user_attrs = {KILLS: trial.user_attrs.get(KILLS, 0) + (STOPPED not in trial.user_attrs)}
                if trial.user_attrs[KILLS] <= MAX_RETRIES:
                    Retry(inherit_intermediate_values=True)(self.study, trial)


def chain_number(trial: FrozenTrial) -> int:
    """Return the number of the first trial of a trial's chain."""
    return (Retry.retry_history(trial) or [trial.number])[0]


def unknown_objective(objective: str, known: list[str]) -> OwlError:
    """Return the error for an objective that is not among the metrics."""
    found = f"the objective '{objective}' is none of the metrics that trials log{suggestion(objective, known)}"
    advice = "correct it in the sweep's YAML and run the same command again"
    return OwlError("sweep.objective", f"{found} (they are: {', '.join(known)}); {advice}")
