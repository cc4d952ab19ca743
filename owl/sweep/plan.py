"""A sweep's YAML: the search space, the sampler and the objective."""

import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, BruteForceSampler, CmaEsSampler, RandomSampler, TPESampler
from optuna.trial import Trial

from owl.configuration import check_file
from owl.errors import OwlError, suggestion

SAMPLERS: dict[str, Callable] = {
    "tpe": partial(TPESampler, constant_liar=True),  # workers avoid settings that others are trying
    "random": RandomSampler,
    "cmaes": partial(CmaEsSampler, warn_independent_sampling=False),  # about choices, which CMA-ES samples at random
    "grid": BruteForceSampler,  # Optuna's GridSampler does not support conditions
}
PRUNERS: dict[str, Callable] = {"none": NopPruner, "median": MedianPruner, "asha": SuccessiveHalvingPruner}
SUGGEST = {
    CategoricalDistribution: Trial.suggest_categorical,
    FloatDistribution: Trial.suggest_float,
    IntDistribution: Trial.suggest_int,
}
LARGEST_GRID = 10_000
RESERVED = ("config", "name", "runs", "ckpt_path", "overwrite")
"""Options of fit that are set by the sweep."""

Direction = Literal["minimize", "maximize"]
Choice = None | bool | int | float | str
Setting = dict[str, Choice]
"""Value by dotted key; lists and mappings are encoded as JSON."""


@dataclass(frozen=True)
class Parameter:
    """A dotted key of the experiment and its search space."""

    key: str
    distribution: BaseDistribution
    when: dict[str, list[str]]
    """Condition: earlier keys and their values, as typed, for which this key is active."""

    def is_active(self, chosen: Setting) -> bool:
        """Return whether the key is active, given the values drawn so far."""
        return all(key in chosen and plain(chosen[key]) in values for key, values in self.when.items())

    def extremes(self) -> list[Choice]:
        """Return every choice, or both ends of the range."""
        limits = vars(self.distribution)
        return list(limits.get("choices") or (limits["low"], limits["high"]))

    def points(self) -> list[Choice]:
        """Return every value; a range must have steps."""
        limits = vars(self.distribution)
        if "choices" in limits:
            return list(limits["choices"])
        steps = round((limits["high"] - limits["low"]) / limits["step"])
        return [limits["low"] + limits["step"] * n for n in range(steps + 1)]


@dataclass(frozen=True)
class Plan:
    """A sweep; docs/how-to/sweep.md explains the fields."""

    name: str
    objective: str
    direction: Direction
    trials: int
    sampler: dict[str, Any]
    """``name``, and the arguments of its class in Optuna."""
    pruner: dict[str, Any]
    """The same."""
    seed: int
    storage: str | None
    """SQL URL; None is SQLite in the sweep's folder."""
    space: list[Parameter]

    def make_sampler(self, draws: int) -> BaseSampler:
        """Return a sampler for the next trial.

        Args:
            draws: Number of trials so far, which changes the seed: a new sampler would otherwise repeat its draws.
        """
        return make(SAMPLERS, {**self.sampler, "seed": (self.seed * 1_000_003 + draws) % 2**32})

    def draw(self, trial: Trial) -> Setting:
        """Draw a setting with the study's sampler."""
        chosen: Setting = {}
        for parameter in self.space:
            if parameter.is_active(chosen):
                suggest: Any = SUGGEST[type(parameter.distribution)]
                chosen[parameter.key] = suggest(trial, parameter.key, **vars(parameter.distribution))
        return chosen

    def grid(self, chosen: Setting) -> Iterator[Setting]:
        """Yield every setting that starts with ``chosen``; ranges must have steps."""
        left = next((p for p in self.space if p.key not in chosen and p.is_active(chosen)), None)
        if left is None:
            yield chosen
            return
        for value in left.points():
            yield from self.grid({**chosen, left.key: value})

    def probes(self) -> list[Setting]:
        """Return a few settings in which every choice and both ends of every range occur."""
        missing = {parameter.key: parameter.extremes() for parameter in self.space}
        probes: list[Setting] = []
        while any(missing.values()):
            wanted: Setting = {}
            for parameter in reversed(self.space):  # a conditional key requires its condition
                if missing[parameter.key]:
                    wanted.update({key: values[0] for key, values in parameter.when.items()})
            chosen: Setting = {}
            for parameter in self.space:
                if parameter.is_active(chosen):
                    left = missing[parameter.key] or [wanted.get(parameter.key, parameter.extremes()[0])]
                    chosen[parameter.key] = left.pop(0)
            if chosen in probes:
                break  # the remaining values have conditions that cannot be met
            probes.append(chosen)
        return probes

    def identity(self) -> dict[str, Any]:
        """Return the fields that must not change within a study: the search space and the objective."""
        space = {p.key: {"drawn": repr(p.distribution), **({"when": p.when} if p.when else {})} for p in self.space}
        return {"objective": self.objective, "direction": self.direction, "space": space}


def make(classes: dict[str, Callable], described: dict[str, Any]) -> Any:
    """Build a sampler or a pruner from its name and its arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return classes[described["name"]](**{key: value for key, value in described.items() if key != "name"})


def options(setting: Setting) -> list[str]:
    """Return a setting as options of fit."""
    return [f"--{key}={plain(value)}" for key, value in setting.items()]


def plain(value: Any) -> str:
    """Return a value as typed on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def load_plan(path: str | Path, trials: int | None = None) -> Plan:
    """Read a sweep's YAML.

    Args:
        path: The file.
        trials: Overrides the number of trials in the file.

    Raises:
        OwlError: The file is missing, or has an invalid key or value.
    """
    if not Path(path).is_file():
        raise OwlError("arguments.missing-file", f"there is no file {str(path)!r}; give a sweep's YAML with --sweep")
    check_file(str(path))
    try:
        return parse_plan(yaml.safe_load(Path(path).read_bytes()), Path(path).stem, trials)
    except OwlError as error:
        error.message = f"{path}: {error.message}"
        raise


def parse_plan(content: dict[str, Any], name: str, trials: int | None = None) -> Plan:
    """Turn the content of a sweep's YAML into a plan.

    Args:
        content: The content.
        name: Default name of the sweep.
        trials: Overrides the number of trials in the content.

    Raises:
        OwlError: A key or a value is invalid.
    """
    given = {"name": name, **{key: value for key, value in content.items() if value is not None}}
    return _call(_plan, {**given, "trials": trials} if trials else given, "the sweep")


def _call(function: Callable, given: Any, where: str) -> Any:
    """Call a function with a mapping of a YAML; report unknown and missing keys and invalid values as an OwlError."""
    if not isinstance(given, dict):
        raise OwlError("sweep.value", f"{where} is {given!r}, expected a mapping")
    parameters = {key: p.default is p.empty for key, p in inspect.signature(function).parameters.items()}
    accepted = f" (accepted: {', '.join(parameters)})"
    if unknown := [key for key in given if key not in parameters]:
        near = suggestion(unknown[0], parameters)
        raise OwlError("sweep.unknown-key", f"{where} has an unknown key '{unknown[0]}'{near}{accepted}")
    if missing := [key for key, is_required in parameters.items() if is_required and key not in given]:
        raise OwlError("sweep.missing-key", f"{where} has no key '{missing[0]}', which it needs{accepted}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # Optuna's, if steps do not reach the end of a range
            warnings.simplefilter("ignore", ExperimentalWarning)
            return function(**given)
    except (TypeError, ValueError, UserWarning) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise OwlError("sweep.value", f"{where} has a wrong value ({reason}); correct it") from error


def _plan(
    *,
    objective: Any,
    direction: Any,
    space: Any,
    name: Any,
    trials: Any = None,
    sampler: Any = "tpe",
    pruner: Any = "none",
    seed: Any = 0,
    storage: Any = None,
) -> Plan:
    """Check the keys of a sweep; invalid values raise ValueError or TypeError."""
    for key, value, least in (("trials", trials, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int | None) or (value is not None and value < least):
            raise ValueError(f"{key} is {value!r}, not a whole number of at least {least}")
    if str(name).startswith((".", "/")):
        raise ValueError(f"name is {name!r}, not a name for a folder in runs")
    if not isinstance(space, dict) or not space:
        raise ValueError(f"space is {space!r}, not dotted keys of the experiment with {{low, high}} or {{choices}}")
    parameters: dict[str, Parameter] = {}
    for key, entry in space.items():
        parameters[key] = _call(partial(_parameter, str(key), parameters), entry, f"key 'space.{key}'")
    sampler, pruner = _described(sampler, SAMPLERS, "sampler"), _described(pruner, PRUNERS, "pruner")
    kind = sampler["name"]
    if kind == "cmaes" and all(isinstance(p.distribution, CategoricalDistribution) for p in parameters.values()):
        raise ValueError("sampler 'cmaes' moves through numbers, but every key has choices")
    direction = _one_of(direction, ("minimize", "maximize"), "direction")
    space = [*parameters.values()]
    plan = Plan(str(name), str(objective), direction, trials or 0, sampler, pruner, seed, storage, space)
    if kind == "grid":
        if endless := [key for key, p in parameters.items() if vars(p.distribution).get("step", 1) is None]:
            raise ValueError(f"sampler 'grid' cannot count space.{endless[0]}, which needs choices or a step")
        points = sum(1 for _ in islice(plan.grid({}), LARGEST_GRID + 1))
        if points > LARGEST_GRID:
            raise ValueError(f"sampler 'grid' would try more than {LARGEST_GRID:,} settings")
        return replace(plan, trials=min(points, trials or points))
    if trials is None:
        raise ValueError("trials is missing, which only a grid counts itself")
    return plan


def _described(content: Any, classes: dict[str, Callable], what: str) -> dict[str, Any]:
    """Read a sampler or a pruner: its name, or a mapping with its name and arguments of its class."""
    content = content if isinstance(content, dict) else {"name": content}
    name = _one_of(str(content.get("name")).lower(), classes, what)
    _call(classes[name], {key: value for key, value in content.items() if key != "name"}, f"key '{what}'")
    return {**content, "name": name}


def _parameter(
    key: str,
    above: dict[str, Parameter],
    /,
    choices: Any = None,
    low: Any = None,
    high: Any = None,
    log: Any = False,
    step: Any = None,
    type: Any = None,
    when: Any = None,
) -> Parameter:
    """Check one key of the space; a range is of integers if its ends are integers, unless ``type`` is given."""
    if key in RESERVED:
        raise ValueError(f"{key} is an option that the sweep sets itself")
    numbers: dict[str, Any] = {}
    for name, value in {"low": low, "high": high, "step": step}.items():
        with suppress(ValueError):  # YAML 1.1 parses 1e-3 as text, since it has no point
            value = float(value) if isinstance(value, str) else value
        if isinstance(value, bool) or not isinstance(value, int | float | None) or not math.isfinite(value or 0):
            raise TypeError(f"{name} is {value!r}, not a number")
        numbers |= {} if value is None else {name: value}
    if choices is not None:
        if numbers or not isinstance(choices, list):
            raise TypeError(f"choices is {choices!r} beside {numbers}, not a list alone")
        encoded = [
            json.dumps(c) if isinstance(c, list | dict) else c for c in choices
        ]  # Optuna stores only plain values
        if len({*map(plain, encoded)}) < len(encoded):
            raise ValueError(f"choices {choices!r} name a value twice")
        drawn: BaseDistribution = CategoricalDistribution(encoded)
    elif missing := {"low", "high"} - numbers.keys():
        raise TypeError(f"{' and '.join(sorted(missing))} is missing, or choices")
    else:
        is_whole = all(isinstance(value, int) for value in numbers.values())
        kind = _one_of(type or ("int" if is_whole else "float"), ("int", "float"), "type")
        if kind == "int" and not all(float(value).is_integer() for value in numbers.values()):
            raise ValueError(f"type is int, but one of {numbers} has a fraction")
        make_range: Callable = FloatDistribution if kind == "float" else IntDistribution
        numbers = {name: float(value) if kind == "float" else int(value) for name, value in numbers.items()}
        drawn = make_range(**numbers, log=_one_of(log, (False, True), "log"))
    if not isinstance(when or {}, dict):
        raise TypeError(f"when is {when!r}, not a mapping")
    conditions: dict[str, list[str]] = {}
    for parent, wanted in (when or {}).items():
        known = [*map(plain, vars(above[parent].distribution).get("choices", []))] if parent in above else []
        if not known:
            raise ValueError(f"when names '{parent}', not a key above with choices{suggestion(parent, above)}")
        is_one = plain(wanted) in known or not isinstance(wanted, list)
        conditions[parent] = [_one_of(plain(v), known, f"when.{parent}") for v in ([wanted] if is_one else wanted)]
    return Parameter(key, drawn, conditions)


def _one_of(value: Any, accepted: Iterable[Any], where: str) -> Any:
    """Return a value if it is one of the accepted values."""
    if value not in accepted:
        near = suggestion(value, map(str, accepted))
        raise ValueError(f"{where} is {value!r}{near} (accepted: {', '.join(map(str, accepted))})")
    return value
