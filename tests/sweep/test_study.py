"""Trials shared by workers, interrupted and continued, with SQLite or another database."""

import multiprocessing
import os
import signal
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

from owl.sweep.plan import Plan
from owl.sweep.study import GRACE_PERIOD, SweepStudy, chain_number, open_storage
from tests.helpers.errors import refused
from tests.helpers.sweeps import LR, SPACE, load_study, plan_of, silence

FORK = multiprocessing.get_context("fork")


def test_workers_share_the_number_of_trials(tmp_path: Path) -> None:
    plan = plan_of(trials=3)
    one, two = load_study(tmp_path, plan), load_study(tmp_path, plan)
    numbers = [claimed[0] for sweep in (one, two, one, two) if (claimed := sweep.ask())]
    assert numbers == [0, 1, 2]


def test_a_surplus_trial_waits_until_the_number_of_trials_is_increased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers add the last trial at the same time: both have counted before either of them started."""
    plan = plan_of(trials=1)
    one, two = load_study(tmp_path, plan), load_study(tmp_path, plan)
    honest, answers = one.chains, iter([lambda: []])
    monkeypatch.setattr(one, "chains", lambda: next(answers, honest)())
    assert two.ask()[0] == 0
    assert one.ask() is None
    assert one.trial(1).state == TrialState.WAITING
    assert [chain_number(trial) for trial in two.chains()] == [0]
    assert load_study(tmp_path, plan_of(trials=2)).ask()[0] == 1


def claim_all(folder: Path, plan: Plan, barrier: Barrier, results: Any) -> None:
    barrier.wait()
    sweep, numbers = load_study(folder, plan), []
    while claimed := sweep.ask():
        numbers.append(claimed[0])
    results.put(numbers)


def test_workers_that_start_at_the_same_time_share_one_study(tmp_path: Path) -> None:
    """They create the tables and the study, and start trials."""
    plan, barrier, results = plan_of(trials=6, sampler="random"), FORK.Barrier(4), FORK.Queue()
    workers = [FORK.Process(target=claim_all, args=(tmp_path, plan, barrier, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    numbers = [number for _ in workers for number in results.get(timeout=200)]
    for worker in workers:
        worker.join()
    assert len(numbers) == len(set(numbers)) == 6
    assert [t.state for t in load_study(tmp_path, plan).chains()] == [TrialState.RUNNING] * 6


def test_two_workers_never_take_the_same_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One checks that it is free; the other tries to start it before the first has done so."""
    plan = plan_of(trials=1)
    one, two = load_study(tmp_path, plan), load_study(tmp_path, plan)
    one.ask()
    one.tell(0, TrialState.FAIL)
    one.retry_interrupted()
    taken: list[Any] = []
    other = Thread(target=lambda: taken.append(two.ask()))
    check = one.storage.check_trial_is_updatable

    def check_while_the_other_claims(*arguments: Any) -> None:
        check(*arguments)
        if not other.ident:
            other.start()
            other.join(1.0)  # it returns only if it does not wait for this transaction

    monkeypatch.setattr(one.storage, "check_trial_is_updatable", check_while_the_other_claims)
    taken.append(one.ask())
    other.join()
    assert sorted(claimed is None for claimed in taken) == [False, True]


def test_a_killed_workers_trial_is_continued_and_given_up_after_three_kills(tmp_path: Path) -> None:
    plan = plan_of(trials=1)
    sweep = load_study(tmp_path, plan)
    number, setting = sweep.ask()
    sweep.storage.set_trial_intermediate_value(sweep.trial_id(number), 1, 20.0)
    sweep.retry_interrupted()
    assert sweep.ask() is None  # it is running in this process
    for kill in range(3):
        silence(sweep, number, GRACE_PERIOD + 1)
        sweep.retry_interrupted()
        claimed = sweep.ask()
        assert (claimed is not None) == (kill < 2)
        if claimed is not None:
            number, again = claimed
            assert again == setting
            assert sweep.trial(number).intermediate_values == {1: 20.0}
            assert chain_number(sweep.trial(number)) == 0
    assert sweep.ask() is None
    (chain,) = sweep.chains()
    assert chain.state == TrialState.FAIL


def test_a_worker_without_heartbeats_loses_its_trial_and_notices(tmp_path: Path) -> None:
    """A shorter gap may also be a slow clock: SQLite uses that of the machine that writes."""
    sweep = load_study(tmp_path, plan_of(trials=1))
    number, _ = sweep.ask()
    silence(sweep, number, GRACE_PERIOD - 30)
    sweep.retry_interrupted()
    assert sweep.record_heartbeat(number)
    silence(sweep, number, GRACE_PERIOD + 1)
    sweep.retry_interrupted()
    assert not sweep.record_heartbeat(number)


def test_a_trial_is_found_if_its_worker_was_killed_while_starting_or_continuing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = load_study(tmp_path, plan_of(trials=1))
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "suggest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sweep.ask()
    silence(sweep, 0, GRACE_PERIOD + 1)
    load_study(tmp_path, sweep.plan).retry_interrupted()
    assert sweep.ask()[0] == 1
    sweep.storage.set_trial_state_values(sweep.trial_id(1), TrialState.FAIL)  # and nothing was added to continue it
    load_study(tmp_path, sweep.plan).retry_interrupted()
    number, setting = sweep.ask()
    assert chain_number(sweep.trial(number)) == 0
    assert LR in setting


def test_only_one_of_two_continuations_of_a_trial_counts(tmp_path: Path) -> None:
    """Two workers find the same interrupted trial at the same time."""
    sweep = load_study(tmp_path, plan_of(trials=2))
    number, _ = sweep.ask()
    sweep.tell(number, TrialState.FAIL)
    for _ in range(2):
        RetryHeartbeatStaleTrialCallback()(sweep.study, sweep.trial(number))
    sweep.retry_interrupted()
    assert [sweep.ask()[0] for _ in range(2)] == [1, 3]
    assert sweep.ask() is None
    sweep.tell(1, TrialState.COMPLETE, 1.0)
    assert [t.state for t in sweep.chains()] == [TrialState.COMPLETE, TrialState.RUNNING]


def die_within_a_transaction(sweep: SweepStudy) -> None:
    with sweep.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trials SET state = 'COMPLETE'")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_killed_within_a_transaction_leaves_the_study_as_it_was(tmp_path: Path) -> None:
    sweep = load_study(tmp_path, plan_of(trials=2))
    sweep.ask()
    sweep.storage.engine.dispose()
    worker = FORK.Process(target=die_within_a_transaction, args=(sweep,))
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    assert sweep.ask()[0] == 1
    assert [t.state for t in sweep.chains()] == [TrialState.RUNNING] * 2


def test_a_study_refuses_another_space_only_once_it_has_results(tmp_path: Path) -> None:
    plan = plan_of()
    sweep = load_study(tmp_path, plan)
    number, _ = sweep.ask()
    other = plan_of(objective="val/l1")
    assert load_study(tmp_path, other).study.user_attrs["identity"]["objective"] == "val/l1"
    load_study(tmp_path, plan)
    sweep.tell(number, TrialState.COMPLETE, 1.0)
    load_study(tmp_path, plan_of(sampler="random", pruner="asha", trials=9))
    with refused("sweep.other-plan", f"'{plan.name}'", "another objective and space"):
        load_study(tmp_path, plan_of(objective="val/l1", space={LR: SPACE[LR]}))


def test_another_database_works_and_an_unusable_one_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEPS", str(tmp_path / "sweeps.db"))
    plan = plan_of(storage="sqlite:///$SWEEPS", trials=2)
    sweep = load_study(tmp_path, plan)
    number, setting = sweep.ask()
    sweep.tell(number, TrialState.FAIL)
    sweep.retry_interrupted()
    assert sweep.ask()[1] == setting
    assert (tmp_path / "sweeps.db").exists()
    with refused("sweep.storage", "nothing://x"):
        open_storage("nothing://x")
