"""The sweep's YAML: its values, what is refused, and that suggestions stay in its space."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from owl.cli.arguments import gather_options
from owl.commands.sweep import load_plan
from owl.sweep.plan import options
from tests.helpers.errors import refused
from tests.helpers.sweeps import ADAMW, LR, MUON, OPTIMIZER, RATIO, SPACE, SWEEP, load_study, plan_of
from tests.helpers.tiny import REPOSITORY, write_config

MISTAKES: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "key": ({"sampeler": "tpe"}, "arguments.unknown-key", ("'sampeler'", "did you mean 'sampler'?")),
    "no objective": ({"objective": None}, "arguments.missing-key", ("tried.yaml", "objective")),
    "no trials": ({"trials": None}, "sweep.value", ("trials is missing",)),
    "trials": ({"trials": "few"}, "arguments.wrong-value", ("'trials'", "'few'")),
    "negative": ({"trials": -1}, "sweep.value", ("trials is -1",)),
    "direction": (
        {"direction": "maximise"},
        "arguments.wrong-value",
        ("'direction' is 'maximise'", "did you mean 'maximize'?", "minimize, maximize"),
    ),
    "sampler": ({"sampler": "tpa"}, "arguments.wrong-value", ("'sampler' is 'tpa'", "did you mean 'tpe'?")),
    "pruner": (
        {"pruner": {"name": "medain"}},
        "sweep.value",
        ("pruner is 'medain'", "did you mean 'median'?", "none, median, asha"),
    ),
    "argument": (
        {"pruner": {"name": "median", "n_startup": 3}},
        "sweep.value",
        ("'pruner'", "'n_startup'", "did you mean 'n_startup_trials'?"),
    ),
    "value": ({"pruner": {"name": "asha", "reduction_factor": 1}}, "sweep.value", ("'pruner'", "reduction_factor")),
    "empty space": ({"space": {}}, "sweep.value", ("space", "{low, high}", "{choices}")),
    "no space": ({"space": ["lr"]}, "arguments.wrong-value", ("'space'",)),
    "range": ({"space": {LR: 3}}, "arguments.wrong-value", (f"'space.{LR}' is '3'", "Parameter")),
    "range key": (
        {"space": {LR: {"low": 1, "hihg": 2}}},
        "arguments.unknown-key",
        (f"'space.{LR}.hihg'", "did you mean 'high'?"),
    ),
    "no high": ({"space": {LR: {"low": 1}}}, "sweep.value", (f"'space.{LR}'", "low and high")),
    "low > high": ({"space": {LR: {"low": 2, "high": 1}}}, "sweep.value", (f"'space.{LR}'", "low=2, high=1")),
    "endless": ({"space": {LR: {"low": 2, "high": float("inf")}}}, "sweep.value", (f"'space.{LR}'", "'high': inf")),
    "log": ({"space": {LR: {"low": 0, "high": 1.0, "log": True}}}, "sweep.value", (f"'space.{LR}'", "`low > 0`")),
    "log's value": (
        {"space": {LR: {"low": 1, "high": 2, "log": "often"}}},
        "arguments.wrong-value",
        (f"'space.{LR}.log' is 'often'",),
    ),
    "log and step": (
        {"space": {LR: {"low": 1, "high": 4, "log": True, "step": 1.5}}},
        "sweep.value",
        (f"'space.{LR}'", "step", "log"),
    ),
    "step": ({"space": {LR: {"low": 1, "high": 4, "step": 2}}}, "sweep.value", (f"'space.{LR}'", "[1, 4]", "step=2")),
    "text": ({"space": {LR: {"low": "few", "high": 4}}}, "arguments.wrong-value", (f"'space.{LR}.low' is 'few'",)),
    "truth": ({"space": {LR: {"low": True, "high": 4}}}, "arguments.wrong-value", (f"'space.{LR}.low' is 'True'",)),
    "both": ({"space": {LR: {"choices": [1], "low": 0}}}, "sweep.value", (f"'space.{LR}'", "[1]", "'low'")),
    "no choice": ({"space": {LR: {"choices": []}}}, "sweep.value", (f"'space.{LR}'", "choices")),
    "no list": ({"space": {LR: {"choices": "ab"}}}, "arguments.wrong-value", (f"'space.{LR}.choices' is 'ab'",)),
    "twice": ({"space": {LR: {"choices": [1, 1]}}}, "sweep.value", (f"'space.{LR}'", "[1, 1]", "twice")),
    "condition": (
        {"space": {LR: {**SPACE[LR], "when": {OPTIMIZER: MUON}}}},
        "sweep.value",
        (f"'space.{LR}.when'", OPTIMIZER),
    ),
    "condition's value": (
        {"space": {**SPACE, RATIO: {**SPACE[RATIO], "when": {OPTIMIZER: "owl.optim.MuonAdam"}}}},
        "sweep.value",
        (f"'space.{RATIO}.when.{OPTIMIZER}'", f"did you mean '{MUON}'?"),
    ),
    "condition on a range": (
        {"space": {LR: SPACE[LR], "a.b": {"choices": [1], "when": {LR: 1}}}},
        "sweep.value",
        ("'space.a.b.when'", LR),
    ),
    "no condition": (
        {"space": {LR: {**SPACE[LR], "when": "muon"}}},
        "arguments.wrong-value",
        (f"'space.{LR}.when' is 'muon'",),
    ),
    "grid": ({"sampler": "grid"}, "sweep.value", (f"'space.{LR}'", "'grid'")),
    "large grid": ({"sampler": "grid", "space": {LR: {"low": 1, "high": 99999}}}, "sweep.value", ("'grid'", "10,000")),
    "cmaes": ({"sampler": "cmaes", "space": {OPTIMIZER: SPACE[OPTIMIZER]}}, "sweep.value", ("'cmaes'", "choices")),
    "reserved": ({"space": {"name": {"choices": ["a"]}}}, "sweep.value", ("'space.name'",)),
    "outside": ({"name": "../elsewhere"}, "sweep.value", ("'../elsewhere'",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_plan_is_reported_in_one_sentence(mistake: str) -> None:
    changes, code, tokens = MISTAKES[mistake]
    with refused(code, "tried.yaml", *tokens):
        plan_of(**changes)


def test_a_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with refused("arguments.missing-file", str(tmp_path / "none.yaml"), "--sweep"):
        load_plan(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("space: [")
    with refused("arguments.not-yaml", str(tmp_path / "broken.yaml")):
        load_plan(tmp_path / "broken.yaml")
    write_config(tmp_path / "wrong.yaml", {**SWEEP, "sampler": "tpa"})
    with refused("arguments.wrong-value", f"{tmp_path / 'wrong.yaml'}: ", "'sampler' is 'tpa'", "'tpe'"):
        load_plan(tmp_path / "wrong.yaml")
    write_config(tmp_path / "right.yaml", SWEEP)
    assert load_plan(tmp_path / "right.yaml").name == "right"
    assert load_plan(tmp_path / "right.yaml", trials=9).trials == 9


def test_ranges_with_integer_ends_give_integers() -> None:
    ranges = {
        "whole": {"low": 1, "high": 9},
        "real": {"low": 1, "high": 9.0},
        "text": {"low": "1e0", "high": 2},
    }
    kinds = {key: type(p.distribution).__name__ for key, p in plan_of(space=ranges).space.items()}
    assert kinds == {"whole": "IntDistribution", "real": "FloatDistribution", "text": "FloatDistribution"}


def test_ranges_stay_integers_after_another_class_was_parsed() -> None:
    program = """
from tests.helpers.sweeps import plan_of
from owl.cli.mistakes import parser_of

class Other:
    def __init__(self, limit: float | int | None = None) -> None: ...

assert isinstance(parser_of(Other).parse_object({"limit": 1}).limit, float)
print(plan_of(space={"whole": {"low": 1, "high": 9}}).space["whole"])
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "low=1, high=9" in ran.stdout


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes"])
def test_suggestions_stay_in_the_space_meet_conditions_and_are_reproducible(sampler: str, tmp_path: Path) -> None:
    drawn = []
    for attempt in ("first", "second"):
        plan = plan_of(sampler=sampler, trials=6)
        sweep = load_study(tmp_path / attempt, plan)
        settings = []
        while claimed := sweep.ask():
            number, setting = claimed
            assert 1e-4 <= setting[LR] <= 0.1
            assert (RATIO in setting) == (setting[OPTIMIZER] == MUON)
            settings.append(setting)
            sweep.tell(number, TrialState.COMPLETE, float(setting[LR]))
            if len(settings) == 3:
                sweep = load_study(tmp_path / attempt, plan)  # as after a restart, which must not repeat what was drawn
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
    sweep = load_study(tmp_path, plan)
    tried = []
    while claimed := sweep.ask():
        tried.append(options(claimed[1]))
        sweep.tell(claimed[0], TrialState.COMPLETE, 1.0)
    assert len(tried) == len({tuple(setting) for setting in tried}) == 8
    assert [f"--{OPTIMIZER}={MUON}", f"--{RATIO}=1.5", "--data.init_args.size=[64, 96]"] in tried


def test_boundary_settings_contain_every_choice_and_both_ends() -> None:
    plan = plan_of(space={**SPACE, "data.init_args.batch_size": {"choices": [2, 4, 8]}})
    probes = plan.boundary_settings()
    assert len(probes) <= 4
    for key, parameter in plan.space.items():
        assert {probe[key] for probe in probes if key in probe} == set(parameter.boundary_values())
    assert all((RATIO in probe) == (probe[OPTIMIZER] == MUON) for probe in probes)


def test_boundary_settings_meet_nested_conditions() -> None:
    space = {"a": [1, 2], "b": [1, 2], "c": [1, 2, 3]}
    when = {"b": {"a": 2}, "c": {"b": 2}}
    plan = plan_of(space={key: {"choices": values, "when": when.get(key, {})} for key, values in space.items()})
    probes = plan.boundary_settings()
    assert {probe["c"] for probe in probes if "c" in probe} == {1, 2, 3}
    assert all(str(probe["a"]) == "2" for probe in probes if "b" in probe)
    assert all(str(probe["b"]) == "2" for probe in probes if "c" in probe)


def test_options_of_fit_are_passed_on() -> None:
    typed = ["--config", "a.yaml", "--trainer.max_steps", "-1", "--sweep", "s.yaml", "--config=b.yaml", "--model.x=[1]"]
    assert gather_options([*typed, "--workers", "2"]) == [
        *("--sweep", "s.yaml", "--workers", "2"),
        '--config=["a.yaml", "b.yaml"]',
        '--options=["--trainer.max_steps=-1", "--model.x=[1]"]',
    ]
