"""A sweep's YAML: the search space, the sampler and the objective."""

import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, BruteForceSampler, CmaEsSampler, RandomSampler, TPESampler
from optuna.trial import Trial

from owl.errors import OwlError, suggestion

SAMPLERS: dict[str, Callable] = {
    "tpe": TPESampler,
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

Choice = None | bool | int | float | str
Setting = dict[str, Choice]
"""Value by dotted key; lists and mappings are encoded as JSON."""


@dataclass(frozen=True)
class Parameter:
    """The search space of a key: ``choices``, or a range from ``low`` to ``high``.

    Args:
        choices: Values of any kind.
        low: Smallest value. A range is of integers if all its numbers are.
        high: Largest value.
        step: Distance between values of a range.
        log: Whether a range is sampled on a logarithmic scale.
        when: Condition: keys above, with the value or the values with which this key applies.
    """

    choices: list[Any] | None = None
    low: int | float | None = None
    high: int | float | None = None
    step: int | float | None = None
    log: bool = False
    when: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def distribution(self) -> BaseDistribution:
        """The distribution in Optuna.

        Raises:
            ValueError: These are neither choices nor a range.
        """
        given = {"low": self.low, "high": self.high, "step": self.step}
        numbers: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.is_choice == bool(numbers) or (numbers and not numbers.keys() >= {"low", "high"}):
            raise ValueError(f"found choices {self.choices} and {numbers}, expected either choices, or low and high")
        if self.choices is not None:  # Optuna stores plain values only
            encoded = [json.dumps(choice) if isinstance(choice, list | dict) else choice for choice in self.choices]
            if len({*map(plain, encoded)}) < len(encoded):
                raise ValueError(f"choices {self.choices} contain a value twice")
            return CategoricalDistribution(encoded)
        if not all(map(math.isfinite, numbers.values())):
            raise ValueError(f"found {numbers}, expected finite numbers")
        is_whole = all(isinstance(value, int) for value in numbers.values())
        with warnings.catch_warnings(action="error", category=UserWarning):  # if steps do not reach the end of a range
            return (IntDistribution if is_whole else FloatDistribution)(**numbers, log=self.log)

    def is_active(self, chosen: Setting) -> bool:
        """Return whether the key is active, given the values drawn so far."""
        return all(key in chosen and plain(chosen[key]) in values for key, values in self.when.items())

    @property
    def is_choice(self) -> bool:
        """Whether it has choices rather than a range."""
        return self.choices is not None

    def extremes(self) -> list[Choice]:
        """Return every choice, or both ends of the range."""
        limits = vars(self.distribution)
        return list(limits["choices"]) if self.is_choice else [limits["low"], limits["high"]]

    def points(self) -> list[Choice]:
        """Return every value; a range must have steps."""
        if self.is_choice:
            return self.extremes()
        low, high, step = (vars(self.distribution)[name] for name in ("low", "high", "step"))
        return [low + step * n for n in range(round((high - low) / step) + 1)]


@dataclass
class Plan:
    """A sweep; docs/how-to/sweep.md explains the keys of its YAML.

    Args:
        objective: A metric of ``metrics.json``.
        direction: Whether smaller or larger values of the objective are better.
        space: Search space of each dotted key of the experiment.
        trials: Number of trials; 0 is the size of a grid.
        sampler: Name of the sampler, or a mapping with ``name`` and arguments of its class in Optuna.
        pruner: The same for the pruner.
        seed: Seed of the sampler.
        name: Name of the sweep's folder in the folder of runs.
        storage: SQL URL; None is SQLite in the sweep's folder.

    Raises:
        OwlError: A value is invalid.
    """

    objective: str
    direction: Literal["minimize", "maximize"]
    space: dict[str, Parameter]
    trials: int = 0
    sampler: dict[str, Any] | Literal["tpe", "random", "cmaes", "grid"] = "tpe"
    pruner: dict[str, Any] | Literal["none", "median", "asha"] = "none"
    seed: int = 0
    name: str = "sweep"
    storage: str | None = None

    def __post_init__(self) -> None:
        if min(self.trials, self.seed) < 0:
            raise wrong(f"trials is {self.trials} and seed {self.seed}, expected no negative number")
        if self.name.startswith((".", "/")):
            raise wrong(f"name is '{self.name}', expected the name of a folder in runs")
        if not self.space:
            raise wrong("space is empty, expected dotted keys of the experiment with {low, high} or {choices}")
        check_arguments("sampler", self.sampler, SAMPLERS)
        check_arguments("pruner", self.pruner, PRUNERS)
        above: dict[str, Parameter] = {}
        for key, parameter in self.space.items():
            above[key] = self._checked(key, parameter, above)
        self.space = above
        sampler = described(self.sampler)["name"]
        if sampler == "cmaes" and all(p.is_choice for p in above.values()):
            raise wrong("sampler 'cmaes' needs a range, but every key has choices")
        if sampler == "grid":
            if endless := [key for key, p in above.items() if not p.is_choice and vars(p.distribution)["step"] is None]:
                raise wrong(f"sampler 'grid' cannot enumerate 'space.{endless[0]}', which needs choices or a step")
            points = sum(1 for _ in islice(self.grid({}), LARGEST_GRID + 1))
            if points > LARGEST_GRID:
                raise wrong(f"sampler 'grid' would try more than {LARGEST_GRID:,} settings")
            self.trials = min(points, self.trials or points)
        if not self.trials:
            raise wrong("trials is missing, which only sampler 'grid' can determine")

    def _checked(self, key: str, parameter: Parameter, above: dict[str, Parameter]) -> Parameter:
        """Return an entry of the space with the values of its conditions as lists, as typed."""
        if key in RESERVED:
            raise wrong(f"key 'space.{key}' is an option that the sweep sets itself")
        try:
            parameter.distribution  # noqa: B018 (which checks it)
        except (ValueError, UserWarning) as error:
            raise wrong(f"key 'space.{key}' is not a search space ({sentence(error)})") from error
        when = {}
        for parent, wanted in parameter.when.items():
            if parent not in above or not above[parent].is_choice:
                near = suggestion(parent, above)
                raise wrong(f"key 'space.{key}.when' has '{parent}', expected a key above with choices{near}")
            known = [*map(plain, above[parent].extremes())]
            is_one = plain(wanted) in known or not isinstance(wanted, list)
            when[parent] = [plain(value) for value in ([wanted] if is_one else wanted)]
            if unknown := [value for value in when[parent] if value not in known]:
                near = suggestion(unknown[0], known)
                expected = f"expected one of {', '.join(known)}{near}"
                raise wrong(f"key 'space.{key}.when.{parent}' is '{unknown[0]}', {expected}")
        return replace(parameter, when=when)

    def make_sampler(self, draws: int) -> BaseSampler:
        """Return a sampler for the next trial.

        Args:
            draws: Number of trials so far, which changes the seed: a new sampler would otherwise repeat its draws.
        """
        return make(SAMPLERS, {**described(self.sampler), "seed": (self.seed * 1_000_003 + draws) % 2**32})

    def draw(self, trial: Trial) -> Setting:
        """Draw a setting with the study's sampler."""
        chosen: Setting = {}
        for key, parameter in self.space.items():
            if parameter.is_active(chosen):
                suggest: Any = SUGGEST[type(parameter.distribution)]
                chosen[key] = suggest(trial, key, **vars(parameter.distribution))
        return chosen

    def grid(self, chosen: Setting) -> Iterator[Setting]:
        """Yield every setting that starts with ``chosen``; ranges must have steps."""
        left = next((key for key, p in self.space.items() if key not in chosen and p.is_active(chosen)), None)
        if left is None:
            yield chosen
            return
        for value in self.space[left].points():
            yield from self.grid({**chosen, left: value})

    def probes(self) -> list[Setting]:
        """Return a few settings in which every choice and both ends of every range occur."""
        missing = {key: parameter.extremes() for key, parameter in self.space.items()}
        probes: list[Setting] = []
        while any(missing.values()):
            wanted: Setting = {}
            for key, parameter in reversed(self.space.items()):  # a conditional key requires its condition
                if missing[key]:
                    wanted.update({parent: values[0] for parent, values in parameter.when.items()})
            chosen: Setting = {}
            for key, parameter in self.space.items():
                if parameter.is_active(chosen):
                    left = missing[key] or [wanted.get(key, parameter.extremes()[0])]
                    chosen[key] = left.pop(0)
            if chosen in probes:
                break  # the remaining values have conditions that cannot be met
            probes.append(chosen)
        return probes

    def identity(self) -> dict[str, Any]:
        """Return the fields that must not change within a study: the search space and the objective."""
        space = {
            key: {"drawn": repr(p.distribution), **({"when": p.when} if p.when else {})}
            for key, p in self.space.items()
        }
        return {"objective": self.objective, "direction": self.direction, "space": space}


def described(given: dict[str, Any] | str) -> dict[str, Any]:
    """Return a sampler or a pruner as a mapping with its name and its arguments."""
    return given if isinstance(given, dict) else {"name": given}


def make(classes: dict[str, Callable], given: dict[str, Any] | str) -> Any:
    """Build a sampler or a pruner."""
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        return classes[described(given)["name"]](**{k: v for k, v in described(given).items() if k != "name"})


def check_arguments(what: str, given: dict[str, Any] | str, classes: dict[str, Callable]) -> None:
    """Check the name and the arguments of a sampler or a pruner."""
    name = str(described(given).get("name"))
    if name not in classes:
        raise wrong(f"{what} is '{name}', expected one of {', '.join(classes)}{suggestion(name, classes)}")
    known = inspect.signature(classes[name]).parameters
    if unknown := [key for key in described(given) if key not in ("name", *known)]:
        raise wrong(f"key '{what}' has an unknown argument '{unknown[0]}'{suggestion(unknown[0], known)}")
    try:
        make(classes, given)
    except (TypeError, ValueError) as error:
        raise wrong(f"key '{what}' has a wrong argument ({sentence(error)})") from error


def wrong(reason: str) -> OwlError:
    """Return the error for a value of the right type that is not valid."""
    return OwlError("sweep.value", f"{reason}; correct it")


def sentence(error: Exception) -> str:
    """Return the message of an error in one line."""
    return " ".join(str(error).split()).rstrip(".")


def options(setting: Setting) -> list[str]:
    """Return a setting as options of fit."""
    return [f"--{key}={plain(value)}" for key, value in setting.items()]


def plain(value: Any) -> str:
    """Return a value as typed on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
