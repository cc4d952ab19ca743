"""Trials shared by workers, lost and continued, through a journal or a database."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from owl.sweep import study
from owl.sweep.study import LEASE, SURPLUS, Member, Outcome, chain_number, open_storage
from tests.helpers.errors import refused
from tests.helpers.sweeps import LR, SPACE, begin, plan_of


def test_workers_share_the_number_of_trials(tmp_path: Path) -> None:
    plan = plan_of(trials=3)
    one, two = begin(tmp_path, plan), begin(tmp_path, plan)
    numbers = [claimed[0] for sweep in (one, two, one, two) if (claimed := sweep.claim(plan))]
    assert numbers == [0, 1, 2]


def test_a_trial_too_many_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers take the last trial in the same moment: both have counted before either of them began."""
    plan = plan_of(trials=1)
    one, two = begin(tmp_path, plan), begin(tmp_path, plan)
    honest, none_yet = one.chains, iter([[]])
    monkeypatch.setattr(one, "chains", lambda: next(none_yet, honest()))
    two.claim(plan)
    assert one.claim(plan) is None
    assert one.trial(1).user_attrs[SURPLUS]
    assert [chain_number(trial) for trial in two.chains()] == [0]


def test_a_killed_workers_trial_is_continued_and_one_that_kills_is_given_up(tmp_path: Path) -> None:
    plan = plan_of(trials=1)
    sweep = begin(tmp_path, plan)
    number, setting = sweep.claim(plan)
    sweep.report(number, 1, 20.0)
    assert sweep.lost() == []  # this very process works on it
    for kill in range(3):
        gone = subprocess.Popen(["true"])
        lease = {"place": study.place(), "members": [[gone.pid, time.time()]], "time": time.time()}
        gone.wait()
        sweep.note(number, LEASE, lease)
        assert [trial.number for trial in sweep.lost()] == [number]
        continued = sweep.interrupt(number, "killed", killed=True)
        assert continued == (kill < 2)
        if continued:
            number, again = sweep.claim(plan)
            assert again == setting
            assert sweep.trial(number).intermediate_values == {1: 20.0}
            assert chain_number(sweep.trial(number)) == 0
    assert sweep.claim(plan) is None
    (chain,) = sweep.chains()
    assert chain.state == TrialState.FAIL


def test_a_process_is_itself_however_the_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    member = Member.of(os.getpid())
    monkeypatch.setattr("psutil.Process.create_time", lambda self: 0.0)  # reckoned from a clock that was set anew
    assert member.alive()
    assert not Member(member.pid, member.started - 1).alive()  # an earlier process of this number
    gone = subprocess.Popen(["sleep", "60"])
    other = Member.of(gone.pid)
    assert other.alive()
    gone.kill()
    while other.alive():  # a zombie is not
        time.sleep(0.01)
    gone.wait()
    assert not other.alive()


def test_a_worker_elsewhere_is_lost_when_it_is_silent(tmp_path: Path) -> None:
    plan = plan_of(trials=1)
    sweep = begin(tmp_path, plan)
    number, _ = sweep.claim(plan)
    for silence, lost in ((study.SILENCE - 60, False), (study.SILENCE + 1, True)):
        sweep.note(number, LEASE, {"place": "elsewhere", "members": [[1, 0.0]], "time": time.time() - silence})
        assert bool(sweep.lost()) == lost


def test_a_study_refuses_another_space_only_once_it_has_results(tmp_path: Path) -> None:
    plan = plan_of()
    sweep = begin(tmp_path, plan)
    number, _ = sweep.claim(plan)
    other = plan_of(objective="val/l1")
    assert begin(tmp_path, other).objective == "val/l1"
    begin(tmp_path, plan)
    sweep.tell(number, Outcome(TrialState.COMPLETE, 1.0))
    begin(tmp_path, plan_of(sampler="random", pruner="asha", trials=9))
    with refused("sweep.other-plan", f"'{plan.name}'", "another objective and space"):
        begin(tmp_path, plan_of(objective="val/l1", space={LR: SPACE[LR]}))


def test_a_database_serves_as_well_and_one_that_cannot_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEPS", str(tmp_path / "sweeps.db"))
    plan = plan_of(storage="sqlite:///$SWEEPS", trials=2)
    sweep = begin(tmp_path, plan)
    number, setting = sweep.claim(plan)
    sweep.interrupt(number, "killed", killed=True)
    assert sweep.claim(plan)[1] == setting
    assert (tmp_path / "sweeps.db").exists()
    with refused("sweep.storage", "nothing://x"):
        open_storage("nothing://x")
