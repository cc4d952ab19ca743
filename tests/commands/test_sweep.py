"""``sweep``: the space it reads, trials shared, lost, stopped and continued, the report, and one sweep of real runs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.trial import TrialState

from owl.arguments import gather_options
from owl.callbacks.pruning import Pruning
from owl.commands.sweep import check, in_terms_of
from owl.errors import OwlError
from owl.sweep import pictures, study
from owl.sweep.plan import Mistake, Plan, load_plan, options, parse_plan
from owl.sweep.report import short_names, write_report
from owl.sweep.study import LEASE, SURPLUS, Outcome, SweepStudy, chain_number, open_storage, storage_address
from owl.sweep.workers import Workers
from tests.helpers.lab import make_lab
from tests.helpers.line import Line, loader, trainer
from tests.helpers.tiny import REPOSITORY, owl, owl_here, write_config
from tests.test_docs import blocks, commands

OPTIMIZER = "model.init_args.optimizer"
LR = f"{OPTIMIZER}.init_args.lr"
RATIO = f"{OPTIMIZER}.init_args.muon_ratio"
MUON, ADAMW = "owl.optim.MuonAdamW", "torch.optim.AdamW"
SPACE: dict[str, Any] = {
    OPTIMIZER: {"choices": [ADAMW, MUON]},
    LR: {"low": "1e-4", "high": 0.1, "log": True},  # YAML reads 1e-4 as text
    RATIO: {"low": 0.5, "high": 2.0, "when": {OPTIMIZER: MUON}},
}
SWEEP: dict[str, Any] = {"objective": "val/psnr", "direction": "maximize", "trials": 4, "space": SPACE}


def plan_of(**changes: Any) -> Plan:
    return parse_plan({**SWEEP, **changes}, "tried", None)


def begin(folder: Path, plan: Plan) -> SweepStudy:
    """A study in a journal below a folder of runs."""
    return SweepStudy.begin(open_storage(storage_address(plan, folder / plan.name)), plan, ["a.yaml"], lambda: None)


# ---------------------------------------------------------------------------------------------------------- the plan

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"sampeler": "tpe"}, "key 'sampeler' is not accepted; did you mean 'sampler'?"),
    "no objective": ({"objective": None}, "key 'objective' is missing; name the logged metric"),
    "no trials": ({"trials": None}, "key 'trials' is missing; give the number of trials"),
    "direction": ({"direction": "maximise"}, "did you mean 'maximize'? (accepted: minimize, maximize)"),
    "sampler": ({"sampler": "tpa"}, "key 'sampler' is 'tpa'; did you mean 'tpe'?"),
    "pruner": ({"pruner": {"name": "medain"}}, "did you mean 'median'? (accepted: none, median, asha)"),
    "argument": ({"pruner": {"name": "median", "n_startup": 3}}, "did you mean 'n_startup_trials'?"),
    "value": ({"pruner": {"name": "asha", "reduction_factor": 1}}, "key 'pruner': "),
    "empty space": ({"space": {}}, "key 'space' is missing; give at least one dotted key"),
    "range": ({"space": {LR: 3}}, f"key 'space.{LR}' is 3, expected {{low, high}}"),
    "range key": (
        {"space": {LR: {"low": 1, "hihg": 2}}},
        f"key 'space.{LR}.hihg' is not accepted; did you mean 'high'?",
    ),
    "no high": ({"space": {LR: {"low": 1}}}, f"key 'space.{LR}' has no high"),
    "low > high": ({"space": {LR: {"low": 2, "high": 1}}}, "has low 2 above high 1; exchange them"),
    "log": ({"space": {LR: {"low": 0, "high": 1.0, "log": True}}}, "a logarithmic range begins above 0"),
    "log and step": ({"space": {LR: {"low": 1, "high": 4, "log": True, "step": 1}}}, "log: true and a step"),
    "step": ({"space": {LR: {"low": 1, "high": 4, "step": 2}}}, "cannot reach high 4 from low 1 in steps of 2"),
    "type": ({"space": {LR: {"low": 0.5, "high": 4, "type": "int"}}}, "has a fraction"),
    "text": ({"space": {LR: {"low": "few", "high": 4}}}, f"key 'space.{LR}.low' is 'few', expected a number"),
    "both": ({"space": {LR: {"choices": [1], "low": 0}}}, "has both choices and low"),
    "no choice": ({"space": {LR: {"choices": []}}}, "expected a list with at least one value"),
    "twice": ({"space": {LR: {"choices": [1, 1]}}}, "names a value twice"),
    "condition": ({"space": {LR: {**SPACE[LR], "when": {OPTIMIZER: MUON}}}}, "does not stand above it"),
    "condition's value": (
        {"space": {**SPACE, RATIO: {**SPACE[RATIO], "when": {OPTIMIZER: "owl.optim.MuonAdam"}}}},
        f"did you mean '{MUON}'?",
    ),
    "condition on a range": (
        {"space": {LR: SPACE[LR], "a.b": {"choices": [1], "when": {LR: 1}}}},
        "only a key with choices",
    ),
    "grid": ({"sampler": "grid"}, f"key 'space.{LR}' is a continuous range, which sampler 'grid' cannot count"),
    "large grid": ({"sampler": "grid", "space": {LR: {"low": 1, "high": 99999}}}, "more than 10,000 settings"),
    "cmaes": ({"sampler": "cmaes", "space": {OPTIMIZER: SPACE[OPTIMIZER]}}, "sampler 'cmaes' moves through numbers"),
    "reserved": ({"space": {"name": {"choices": ["a"]}}}, "key 'space.name' cannot be searched"),
    "outside": ({"name": "../elsewhere"}, "a name for the folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_plan_is_told_in_one_sentence(mistake: str) -> None:
    changes, told = MISTAKES[mistake]
    with pytest.raises(Mistake) as error:
        plan_of(**changes)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(OwlError, match=r"there is no file"):
        load_plan(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("space: [")
    with pytest.raises(OwlError, match=r"broken\.yaml is not valid YAML"):
        load_plan(tmp_path / "broken.yaml")
    write_config(tmp_path / "wrong.yaml", {**SWEEP, "sampler": "tpa"})
    with pytest.raises(OwlError, match=r"wrong\.yaml: key 'sampler' is 'tpa'"):
        load_plan(tmp_path / "wrong.yaml")
    write_config(tmp_path / "right.yaml", SWEEP)
    assert load_plan(tmp_path / "right.yaml").name == "right"
    assert load_plan(tmp_path / "right.yaml", trials=9).trials == 9


def test_numbers_are_whole_where_their_ends_are_unless_told_otherwise() -> None:
    ranges = {
        "whole": {"low": 1, "high": 9},
        "real": {"low": 1, "high": 9, "type": "float"},
        "text": {"low": "1e0", "high": 2},
    }
    kinds = {p.key: type(p.distribution).__name__ for p in plan_of(space=ranges).space}
    assert kinds == {"whole": "IntDistribution", "real": "FloatDistribution", "text": "FloatDistribution"}


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes"])
def test_draws_stay_in_the_space_meet_conditions_and_come_again(sampler: str, tmp_path: Path) -> None:
    drawn = []
    for attempt in ("first", "second"):
        plan = plan_of(sampler=sampler, trials=6)
        sweep = begin(tmp_path / attempt, plan)
        settings = []
        while claimed := sweep.claim(plan):
            number, setting = claimed
            assert 1e-4 <= setting[LR] <= 0.1
            assert (RATIO in setting) == (setting[OPTIMIZER] == MUON)
            settings.append(setting)
            sweep.tell(number, Outcome(TrialState.COMPLETE, float(setting[LR])))
            if len(settings) == 3:
                sweep = begin(tmp_path / attempt, plan)  # as after a restart, which must not repeat what was drawn
        drawn.append(settings)
    assert drawn[0] == drawn[1]
    assert len({setting[LR] for setting in drawn[0]}) == 6


def test_a_grid_tries_every_combination_once(tmp_path: Path) -> None:
    space = {
        OPTIMIZER: {"choices": [ADAMW, MUON]},
        RATIO: {"low": 0.5, "high": 1.5, "step": 0.5, "when": {OPTIMIZER: MUON}},
        "data.init_args.size": {"choices": [[32, 48], [64, 96]]},
    }
    plan = plan_of(sampler="grid", space=space, trials=None)
    assert plan.trials == 8
    sweep = begin(tmp_path, plan)
    tried = []
    while claimed := sweep.claim(plan):
        tried.append(options(claimed[1]))
        sweep.tell(claimed[0], Outcome(TrialState.COMPLETE, 1.0))
    assert len(tried) == len({tuple(setting) for setting in tried}) == 8
    assert [f"--{OPTIMIZER}={MUON}", f"--{RATIO}=1.5", "--data.init_args.size=[64, 96]"] in tried


def test_probes_hold_every_choice_and_both_ends() -> None:
    plan = plan_of(space={**SPACE, "data.init_args.batch_size": {"choices": [2, 4, 8]}})
    probes = plan.probes()
    assert len(probes) <= 4
    for parameter in plan.space:
        assert {probe[parameter.key] for probe in probes if parameter.key in probe} == set(parameter.extremes())
    assert all((RATIO in probe) == (probe[OPTIMIZER] == MUON) for probe in probes)


def test_what_is_meant_for_fit_is_gathered() -> None:
    typed = ["--config", "a.yaml", "--trainer.max_steps", "-1", "--sweep", "s.yaml", "--config=b.yaml", "--model.x=[1]"]
    assert gather_options([*typed, "--workers", "2"]) == [
        *("--sweep", "s.yaml", "--workers", "2"),
        '--config=["a.yaml", "b.yaml"]',
        '--options=["--trainer.max_steps=-1", "--model.x=[1]"]',
    ]


# --------------------------------------------------------------------------------------------------------- the study


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
    with pytest.raises(OwlError, match="another objective and space"):
        begin(tmp_path, plan_of(objective="val/l1", space={LR: SPACE[LR]}))


def test_a_database_serves_as_well_and_one_that_cannot_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEPS", str(tmp_path / "sweeps.db"))
    plan = plan_of(storage="sqlite:///$SWEEPS", trials=2)
    sweep = begin(tmp_path, plan)
    number, setting = sweep.claim(plan)
    sweep.interrupt(number, "killed", killed=True)
    assert sweep.claim(plan)[1] == setting
    assert (tmp_path / "sweeps.db").exists()
    with pytest.raises(OwlError, match="storage nothing://x cannot be opened"):
        open_storage("nothing://x")


# ------------------------------------------------------------------------------------------------------- the callback


class Bad(Line):
    """Logs an objective that does not get better."""

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/psnr", 1.0)


def fit_line(folder: Path, plan: Plan, number: int, **limits: Any) -> Any:
    callback = Pruning(storage_address(plan, folder / plan.name), plan.name, number)
    limits = {"max_steps": 8, "val_check_interval": 2, "check_val_every_n_epoch": None, **limits}
    run = trainer(folder, [callback], **limits)
    run.fit(Bad(), loader(8), loader(1))
    return run


def test_a_hopeless_trial_is_stopped_and_noted(tmp_path: Path) -> None:
    plan = plan_of(pruner={"name": "median", "n_startup_trials": 1})
    sweep = begin(tmp_path, plan)
    first, _ = sweep.claim(plan)
    for step in range(1, 5):
        sweep.report(first, step, 5.0)
    sweep.tell(first, Outcome(TrialState.COMPLETE, 5.0))
    second, _ = sweep.claim(plan)
    assert fit_line(tmp_path, plan, second).global_step == 2
    trial = sweep.trial(second)
    assert trial.intermediate_values == {1: 1.0}
    assert trial.user_attrs["pruned"] == 1
    third, _ = sweep.claim(plan)
    fit_line(tmp_path, plan, third, max_steps=-1, max_epochs=1, val_check_interval=8)
    assert "pruned" not in sweep.trial(third).user_attrs  # it has just finished


def test_a_promising_trial_is_reported_and_left_alone(tmp_path: Path) -> None:
    plan = plan_of(pruner="none")
    sweep = begin(tmp_path, plan)
    number, _ = sweep.claim(plan)
    assert fit_line(tmp_path, plan, number).global_step == 8
    assert sweep.trial(number).intermediate_values == dict.fromkeys(range(1, 5), 1.0)


def test_an_objective_that_is_not_logged_is_told_after_the_first_validation(tmp_path: Path) -> None:
    plan = plan_of(objective="val/psnrr")
    sweep = begin(tmp_path, plan)
    number, _ = sweep.claim(plan)
    with pytest.raises(OwlError, match=r"did you mean 'val/psnr'\? \(they are: .*train/loss"):
        fit_line(tmp_path, plan, number)


# -------------------------------------------------------------------------------------------------------- the workers

TRIAL = """
import json, os, pathlib, signal, sys, time
folder, number, seconds, mark = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
if mark == "crash": sys.exit("owl: error: the loss became nan at step 3")
if mark == "kill" and not (folder / "was_here").exists():
    (folder / "was_here").touch()
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(seconds)
metrics = {"val/psnr": 20.0 + number, "threads": os.environ.get("OMP_NUM_THREADS")}
(folder / "metrics.json").write_text(json.dumps(metrics))
"""
"""What a run of fit leaves for its worker to see, without the seconds that its imports take."""


class QuickWorkers(Workers):
    """Trials that do what ``marks`` says of their chain."""

    def __init__(self, folder: Path, plan: Plan, count: int = 1, seconds: float = 0.0, **marks: str) -> None:
        self.seconds, self.marks = seconds, marks
        self.started: list[list[str]] = []
        sweep = begin(folder, plan)
        super().__init__(sweep, plan, folder, ["--config=a.yaml"], count, 3, "address", lambda: None)

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


def test_failures_are_recorded_and_kills_made_up_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(trials=3)
    crew = QuickWorkers(tmp_path, plan, trial_0="crash", trial_1="kill")
    crew.run()
    chains = crew.study.chains()
    assert [t.state for t in chains] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert chains[0].user_attrs["reason"] == "the loss became nan at step 3"
    assert [chain_number(t) for t in chains] == [0, 1, 3]
    first, second, again, last = crew.started
    assert "--overwrite" in first
    assert "--ckpt_path" not in second
    assert again[again.index("--ckpt_path") + 1] == "last"
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
    crew = QuickWorkers(tmp_path, plan, count=2, seconds=60)
    begun = crew._begin

    def begin_and_interrupt() -> bool:
        has_begun = begun()
        if len(crew.children) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return has_begun

    crew._begin = begin_and_interrupt  # type: ignore[method-assign]
    crew.run()
    assert crew.signal == signal.SIGINT
    assert [t.state for t in crew.study.chains()] == [TrialState.WAITING] * 2
    assert not crew.children
    following = QuickWorkers(tmp_path, plan, count=2)
    following.run()
    assert [t.state for t in following.study.chains()] == [TrialState.COMPLETE] * 2
    assert [t.user_attrs.get("kills") for t in following.study.chains()] == [0, 0]  # a stop is no kill


def test_a_metric_that_is_not_there_stops_the_sweep_and_correcting_it_continues(tmp_path: Path) -> None:
    crew = QuickWorkers(tmp_path, plan_of(objective="psnr", trials=1))
    with pytest.raises(OwlError, match=r"objective 'psnr' is none of the metrics .* did you mean 'val/psnr'\?"):
        crew.run()
    following = QuickWorkers(tmp_path, plan_of(trials=1))
    following.run()
    assert following.study.best().value == 21.0
    assert "last" in following.started[0]


def test_the_killed_workers_trial_ends_and_is_continued(tmp_path: Path) -> None:
    """A worker that is killed takes its trial with it; one that comes later continues it at once."""
    code = (
        "from pathlib import Path; from tests.commands.test_sweep import QuickWorkers, plan_of\n"
        f"QuickWorkers(Path({str(tmp_path)!r}), plan_of(trials=1), seconds=100).run()"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    deadline = time.monotonic() + 100
    while not (sweep := begin(tmp_path, plan_of(trials=1))).chains() or len(members(sweep)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    worker.kill()
    worker.wait()
    crew = QuickWorkers(tmp_path, plan_of(trials=1))
    crew.run()
    (chain,) = crew.study.chains()
    assert chain.state == TrialState.COMPLETE
    assert chain.system_attrs["retry_history"] == [0]


def members(sweep: SweepStudy) -> list[Any]:
    """The processes that work on the first trial."""
    return sweep.trial(0).user_attrs.get(LEASE, {"members": []})["members"]


# --------------------------------------------------------------------------------------------------------- the report


def test_the_report_shows_every_trial_and_best_yaml_is_the_best_run(tmp_path: Path) -> None:
    plan = plan_of(trials=9)
    sweep = begin(tmp_path, plan)
    outcomes = [Outcome(TrialState.COMPLETE, 20.0 + n) for n in range(6)]
    outcomes += [
        Outcome(TrialState.FAIL, reason="a | b"),
        Outcome(TrialState.PRUNED, reason="pruned after 1 validation"),
    ]
    for outcome in outcomes:
        number, _ = sweep.claim(plan)
        sweep.report(number, 1, 3.0)
        sweep.tell(number, outcome)
    sweep.claim(plan)
    run = tmp_path / "tried" / "trial-0005"
    run.mkdir(parents=True)
    callbacks = [{"class_path": "owl.callbacks.pruning.Pruning"}, {"class_path": "a.Kept"}]
    configuration = {
        "name": "tried/trial-0005",
        "ckpt_path": "x",
        "overwrite": True,
        "trainer": {"callbacks": callbacks},
    }
    write_config(run / "config.yaml", configuration)
    write_report(sweep, plan, tmp_path, "python -m owl sweep")
    folder = tmp_path / "tried"
    text = (folder / "report.md").read_text()
    assert "9 of 9 trials: 6 complete, 1 failed, 1 pruned, 1 running" in text
    assert "Trial 5, in trial-0005: `val/psnr` 25.00" in text or "`val/psnr` 25" in text
    assert "a \\| b" in text
    assert len(re.findall(r"^\| \[?\d", text, re.MULTILINE)) == 9
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (folder / picture).stat().st_size > 5000
    assert len(re.findall(r"!\[", text)) == 3
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best == {
        "name": "tried-best",
        "ckpt_path": None,
        "overwrite": False,
        "trainer": {"callbacks": callbacks[1:]},
    }
    assert not list(folder.glob("report.lock*"))


def test_columns_have_short_names_that_differ() -> None:
    keys = ["a.init_args.lr", "b.init_args.lr", "c.weights.kl"]
    assert short_names(keys) == {"a.init_args.lr": "a.lr", "b.init_args.lr": "b.lr", "c.weights.kl": "kl"}


def test_values_stand_where_they_belong_on_an_axis() -> None:
    scale = pictures.Scale(None, 1e-4, 1e-2, log=True)
    assert [round(scale.height(v), 3) for v in (1e-4, 1e-3, 1e-2)] == [0, 0.5, 1]
    assert [pictures.Scale(["a", "b", "c"], 0, 1, False).height(v) for v in "abc"] == [0, 0.5, 1]
    assert pictures.Scale.of_numbers([3.0], log=False).height(3.0) == 0.5


# ----------------------------------------------------------------------------------------------------- the real thing


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lab(tmp_path_factory.mktemp("sweep"))


def test_the_space_is_held_against_the_experiment(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab)
    check(plan_of(), "s.yaml", ["--config=tiny.yaml", "--trainer.max_steps=3"])
    told = {
        f"{OPTIMIZER}.init_args.lrr": {"low": 1, "high": 2},
        "trainer.max_step": {"low": 1, "high": 2},
        "data.init_args.batch_size": {"choices": [2, "many"]},
    }
    for key, values in told.items():
        space = {OPTIMIZER: SPACE[OPTIMIZER], key: values}
        with pytest.raises(OwlError, match=f"s.yaml: key 'space.{re.escape(key)}' is"):
            check(plan_of(space=space), "s.yaml", ["--config=tiny.yaml"])
    assert in_terms_of("s.yaml", ["a.b"], "something else") == "something else"


def test_the_page_is_true_of_a_real_sweep(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands, on the smallest experiment: one trial trains, one has a dataset that is not there."""
    page = REPOSITORY / "docs" / "how-to" / "sweep.md"
    (block,) = (b for b in blocks(page) if b.language == "yaml")
    content = yaml.safe_load(block.content)
    parse_plan(content, "lr", None)
    space = {**content["space"], "data.init_args.path": {"choices": [str(lab / "data"), "missing"]}}
    del space["model.init_args.warmup_steps"]
    fixed = {key: {"choices": [value]} for key, value in {OPTIMIZER: MUON, LR: 0.002, RATIO: 1.5}.items()}
    write_config(lab / block.title, {**content, "sampler": "grid", "trials": 2, "space": {**space, **fixed}})
    write_config(lab / "shorter.yaml", {"trainer": {"max_steps": 2}})
    monkeypatch.setattr(sys, "path", [*sys.path])
    for command in commands(page):
        words = command.replace("experiments/quickstart.yaml", "tiny.yaml --config shorter.yaml").split()[3:]
        if words[0] == "fit":
            with pytest.raises(SystemExit) as exit_:
                owl_here(*words, "--print_config", cwd=lab)
            assert exit_.value.code == 0
        else:
            owl(*words, cwd=lab)
    folder = lab / "runs" / "lr"
    text = (folder / "report.md").read_text()
    assert "2 of 2 trials" in text
    assert "1 complete" in text
    assert "1 failed" in text
    assert "missing" in text
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best["data"]["init_args"]["path"] == str(lab / "data")
    assert best["model"]["init_args"]["optimizer"]["init_args"]["muon_ratio"] == 1.5
    assert best["trainer"]["callbacks"] is None
    assert best["trainer"]["max_steps"] == 2
    assert sorted(path.name for path in folder.glob("trial-*")) == ["trial-0000", "trial-0001"]
