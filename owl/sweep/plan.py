"""A sweep's YAML: the search space, the sampler and the objective."""

import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import Any, Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BruteForceSampler, CmaEsSampler, RandomSampler, TPESampler
from optuna.trial import Trial
from typing_extensions import TypeAliasType

from owl.errors import OwlError, suggestion

CLASSES: dict[str, dict[str, Callable[..., Any]]] = {
    "sampler": {
        "tpe": TPESampler,
        "random": RandomSampler,
        "cmaes": partial(CmaEsSampler, warn_independent_sampling=False),  # of choices, which it samples at random
        "grid": BruteForceSampler,  # Optuna's GridSampler does not support conditions
    },
    "pruner": {"none": NopPruner, "median": MedianPruner, "asha": SuccessiveHalvingPruner},
}
SUGGEST: dict[type, Callable[..., Any]] = {
    CategoricalDistribution: Trial.suggest_categorical,
    FloatDistribution: Trial.suggest_float,
    IntDistribution: Trial.suggest_int,
}
MAX_GRID_SIZE = 10_000
RESERVED = ("config", "name", "runs", "ckpt_path", "overwrite")  # options of fit that the sweep sets

# jsonargparse wraps int | float | None, whose default is None, in Optional. For equal types Python returns the cached
# Optional[float | int | None] of another parser, such as the trainer's, which reads 1 as 1.0. An alias is never equal.
Number = TypeAliasType("Number", int | float)
Setting = dict[str, bool | int | float | str | None]  # by dotted key; lists and mappings are encoded as JSON


@dataclass(frozen=True)
class Parameter:
    """The search space of a key: choices, or a range."""

    choices: list[Any] | None = None
    low: Number | None = None  # a range is of integers if all its numbers are
    high: Number | None = None
    step: Number | None = None
    log: bool = False  # whether a range is sampled on a logarithmic scale
    when: dict[str, Any] = field(default_factory=dict)  # keys above, with the value or values with which this applies

    @cached_property
    def distribution(self) -> BaseDistribution:
        """The distribution in Optuna; a ValueError if these are neither choices nor a range."""
        given = {"low": self.low, "high": self.high, "step": self.step}
        numbers: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.choices is not None and not numbers:  # Optuna stores plain values only
            encoded = [json.dumps(choice) if isinstance(choice, list | dict) else choice for choice in self.choices]
            if len({*map(plain, encoded)}) < len(encoded):
                raise ValueError(f"choices {self.choices} contain a value twice")
            return CategoricalDistribution(encoded)
        if self.choices is not None or not (
            numbers.keys() >= {"low", "high"} and all(map(math.isfinite, numbers.values()))
        ):
            raise ValueError(f"found choices {self.choices} and {numbers}, expected choices, or finite low and high")
        is_whole = all(isinstance(value, int) for value in numbers.values())
        with warnings.catch_warnings(action="error", category=UserWarning):  # if steps do not reach the end of a range
            return (IntDistribution if is_whole else FloatDistribution)(**numbers, log=self.log)

    def boundary_values(self) -> list[Any]:
        """Return every choice, or both ends of the range."""
        limits = vars(self.distribution)
        return list(limits["choices"] if "choices" in limits else (limits["low"], limits["high"]))

    def grid_values(self) -> list[Any]:
        """Return every choice, or every value of the range, which must have steps."""
        low, high, step = self.boundary_values()[0], self.boundary_values()[-1], vars(self.distribution).get("step")
        return [low + step * n for n in range(round((high - low) / step) + 1)] if step else self.boundary_values()


@dataclass
class Plan:
    """A sweep's YAML; docs/how-to/sweep.md explains its keys.

    Raises:
        OwlError: A value is invalid.
    """

    objective: str
    direction: Literal["minimize", "maximize"]
    space: dict[str, Parameter]  # by dotted key of the experiment
    trials: int = 0  # the size of a grid
    sampler: dict[str, Any] | Literal["tpe", "random", "cmaes", "grid"] = "tpe"  # or its name with arguments of Optuna
    pruner: dict[str, Any] | Literal["none", "median", "asha"] = "none"
    seed: int = 0
    name: str = "sweep"
    storage: str | None = None  # SQLite in the sweep's folder

    def __post_init__(self) -> None:
        if min(self.trials, self.seed) < 0:
            raise invalid(f"trials is {self.trials} and seed {self.seed}, expected no negative number")
        if self.name.startswith((".", "/")):
            raise invalid(f"name is '{self.name}', expected the name of a folder in runs")
        if not self.space:
            raise invalid("space is empty, expected dotted keys of the experiment with {low, high} or {choices}")
        sampler, _ = make("sampler", self.sampler), make("pruner", self.pruner)
        parents: dict[str, list[str]] = {}  # choices of each key, as typed
        for key, parameter in self.space.items():
            check_parameter(key, parameter, parents)
            parents[key] = [] if parameter.choices is None else [*map(plain, parameter.boundary_values())]
        if isinstance(sampler, CmaEsSampler) and all(p.choices is not None for p in self.space.values()):
            raise invalid("sampler 'cmaes' needs a range, but every key has choices")
        if isinstance(sampler, BruteForceSampler):
            if continuous := [key for key, p in self.space.items() if vars(p.distribution).get("step", 1) is None]:
                raise invalid(f"sampler 'grid' cannot enumerate 'space.{continuous[0]}', which needs choices or a step")
            points = sum(1 for _ in islice(self.grid({}), MAX_GRID_SIZE + 1))
            if points > MAX_GRID_SIZE:
                raise invalid(f"sampler 'grid' would try more than {MAX_GRID_SIZE:,} settings")
            self.trials = min(points, self.trials or points)
        if not self.trials:
            raise invalid("trials is missing, which only sampler 'grid' can determine")

    @cached_property
    def names(self) -> dict[str, str]:
        """The name of each key of the space in the study: its shortest unique suffix, without ``init_args``."""
        words = {key: [word for word in key.split(".") if word != "init_args"] for key in self.space}
        found: dict[str, str] = {}
        for key, own in words.items():
            ends = (n for n in range(1, len(own)) if [w[-n:] for w in words.values()].count(own[-n:]) == 1)
            found[key] = ".".join(own[-next(ends, len(own)) :])
        return found

    def active(self, chosen: Setting) -> Iterator[tuple[str, Parameter]]:
        """Yield the keys that apply, in order; meanwhile ``chosen`` receives their values, on which others depend."""
        for key, parameter in self.space.items():
            if all(parent in chosen and plain(chosen[parent]) in values for parent, values in parameter.when.items()):
                yield key, parameter

    def suggest(self, trial: Trial) -> Setting:
        """Suggest a setting with the study's sampler."""
        chosen: Setting = {}
        for key, parameter in self.active(chosen):
            limits = parameter.distribution
            chosen[key] = SUGGEST[type(limits)](trial, self.names[key], **vars(limits))
        return chosen

    def grid(self, chosen: Setting) -> Iterator[Setting]:
        """Yield every setting that starts with ``chosen``; ranges must have steps."""
        for key, parameter in self.active(chosen):
            if key not in chosen:
                for value in parameter.grid_values():
                    yield from self.grid({**chosen, key: value})
                return
        yield chosen

    def boundary_settings(self) -> list[Setting]:
        """Return a few settings in which every choice and both ends of every range occur."""
        missing = {key: parameter.boundary_values() for key, parameter in self.space.items()}
        settings: list[Setting] = []
        while any(missing.values()):
            chosen, wanted = Setting(), Setting()
            for key, parameter in reversed(self.space.items()):  # a conditional key requires its condition
                if missing[key] or key in wanted:
                    wanted |= {parent: values[0] for parent, values in parameter.when.items()}
            for key, parameter in self.active(chosen):
                chosen[key] = (missing[key] or [wanted.get(key, parameter.boundary_values()[0])]).pop(0)
            if chosen in settings:
                break  # the remaining values have conditions that cannot be met
            settings.append(chosen)
        return settings


def check_parameter(key: str, parameter: Parameter, parents: dict[str, list[str]]) -> None:
    """Check an entry of the space, and list the values of its conditions as typed.

    Raises:
        OwlError: The entry or a condition is invalid.
    """
    if key in RESERVED:
        raise invalid(f"key 'space.{key}' is an option that the sweep sets itself")
    try:
        parameter.distribution  # noqa: B018 (which checks it)
    except (ValueError, UserWarning) as error:
        raise invalid(f"key 'space.{key}' is not a search space", error) from error
    for parent, wanted in parameter.when.items():
        if not (known := parents.get(parent)):
            near = suggestion(parent, parents)
            raise invalid(f"key 'space.{key}.when' has '{parent}', expected a key above with choices{near}")
        is_one = plain(wanted) in known or not isinstance(wanted, list)
        parameter.when[parent] = [*map(plain, [wanted] if is_one else wanted)]
        for value in parameter.when[parent]:
            if value not in known:
                expected = f"expected one of {', '.join(known)}{suggestion(value, known)}"
                raise invalid(f"key 'space.{key}.when.{parent}' is '{value}', {expected}")


def make(what: str, given: dict[str, Any] | str, **more: Any) -> Any:
    """Build a sampler or a pruner (``what``) of Optuna, from its name or from a mapping with ``name`` and arguments.

    Raises:
        OwlError: The name or an argument is invalid.
    """
    arguments = {**given, **more} if isinstance(given, dict) else {"name": given, **more}
    name, classes = str(arguments.pop("name", None)), CLASSES[what]
    if name not in classes:
        raise invalid(f"{what} is '{name}', expected one of {', '.join(classes)}{suggestion(name, classes)}")
    try:
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            return classes[name](**arguments)
    except (TypeError, ValueError) as error:
        known = inspect.signature(classes[name]).parameters
        near = "".join(suggestion(argument, known) for argument in arguments if argument not in known)
        raise invalid(f"key '{what}' has a wrong argument", error, near) from error


def invalid(reason: str, error: Exception | None = None, near: str = "") -> OwlError:
    """Return the error for a value of the right type that is not valid; ``error`` is that of Optuna."""
    cause = f" ({' '.join(str(error).split()).rstrip('.')})" if error else ""
    return OwlError("sweep.value", f"{reason}{cause}{near}; correct it")


def options(setting: Setting) -> list[str]:
    """Return a setting as options of fit."""
    return [f"--{key}={plain(value)}" for key, value in setting.items()]


def plain(value: Any) -> str:
    """Return a value as typed on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def short(value: object) -> str:
    """Format a number with four significant digits; return other values as text."""
    return f"{value:.4g}" if isinstance(value, float) else plain(value)
