"""A sweep: which settings are tried, in which order, and by which number they are judged."""

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, BruteForceSampler, CmaEsSampler, RandomSampler, TPESampler
from optuna.trial import Trial

# The grid is Optuna's brute force, since its GridSampler knows no conditions.
SAMPLERS: dict[str, type[BaseSampler]] = {
    "tpe": TPESampler,
    "random": RandomSampler,
    "cmaes": CmaEsSampler,
    "grid": BruteForceSampler,
}
PRUNERS: dict[str, type[BasePruner]] = {
    "none": NopPruner,
    "median": MedianPruner,
    "asha": SuccessiveHalvingPruner,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "tpe": {"constant_liar": True},  # workers keep away from what others are just trying
    "cmaes": {"warn_independent_sampling": False},  # of choices, which CMA-ES leaves to chance
}

Direction = Literal["minimize", "maximize"]
Choice = None | bool | int | float | str
Setting = dict[str, Choice]
"""Dotted key to value; a value that is a list or a mapping stands as JSON."""


@dataclass(frozen=True)
class Parameter:
    """One dotted key of the experiment and what it is drawn from."""

    key: str
    distribution: BaseDistribution
    when: dict[str, list[Choice]]
    """Keys further up with the values that make this one count."""

    def is_active(self, chosen: Setting) -> bool:
        """Whether it is drawn at all, given what was drawn so far."""
        return all(key in chosen and any(same(chosen[key], v) for v in values) for key, values in self.when.items())

    def extremes(self) -> list[Choice]:
        """Every choice, or both ends of the range."""
        if isinstance(self.distribution, CategoricalDistribution):
            return list(self.distribution.choices)
        assert isinstance(self.distribution, FloatDistribution | IntDistribution)
        return [self.distribution.low, self.distribution.high]

    def points(self) -> list[Choice] | None:
        """Every value that can be drawn, None where they cannot be counted."""
        drawn = self.distribution
        if isinstance(drawn, CategoricalDistribution):
            return list(drawn.choices)
        assert isinstance(drawn, FloatDistribution | IntDistribution)
        if drawn.step is None:
            return None
        return [drawn.low + drawn.step * n for n in range(round((drawn.high - drawn.low) / drawn.step) + 1)]

    def draw(self, trial: Trial) -> Choice:
        """Let the study's sampler choose a value."""
        drawn = self.distribution
        if isinstance(drawn, CategoricalDistribution):
            return trial.suggest_categorical(self.key, drawn.choices)
        if isinstance(drawn, IntDistribution):
            return trial.suggest_int(self.key, drawn.low, drawn.high, step=drawn.step, log=drawn.log)
        assert isinstance(drawn, FloatDistribution)
        return trial.suggest_float(self.key, drawn.low, drawn.high, step=drawn.step, log=drawn.log)


@dataclass(frozen=True)
class Plan:
    """A sweep, as docs/how-to/sweep.md explains it."""

    name: str
    objective: str
    direction: Direction
    trials: int
    sampler: dict[str, Any]
    """``name``, and what its class of Optuna is given."""
    pruner: dict[str, Any]
    """The same."""
    seed: int
    storage: str | None
    """SQL URL; None is a journal in the sweep's folder."""
    space: list[Parameter]

    def make_sampler(self, draws: int) -> BaseSampler:
        """Return a sampler for the next trial.

        Args:
            draws: Trials so far: a sampler that began anew with the same seed would repeat what it drew before.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return make(SAMPLERS, self.sampler, seed=(self.seed * 1_000_003 + draws) % 2**32)

    def draw(self, trial: Trial) -> Setting:
        """Let the study's sampler choose a setting."""
        chosen: Setting = {}
        for parameter in self.space:
            if parameter.is_active(chosen):
                chosen[parameter.key] = parameter.draw(trial)
        return chosen

    def grid(self) -> Iterator[Setting]:
        """Yield every setting of a space that can be counted."""

        def complete(chosen: Setting, left: list[Parameter]) -> Iterator[Setting]:
            if not left:
                yield chosen
            elif left[0].is_active(chosen):
                for value in left[0].points() or []:
                    yield from complete({**chosen, left[0].key: value}, left[1:])
            else:
                yield from complete(chosen, left[1:])

        return complete({}, self.space)

    def probes(self) -> list[Setting]:
        """Return a few settings in which every choice and both ends of every range occur."""
        missing = {parameter.key: list(parameter.extremes()) for parameter in self.space}
        probes: list[Setting] = []
        while any(missing.values()):
            wanted: dict[str, Choice] = {}
            for parameter in reversed(self.space):  # what counts only on a condition asks for its condition
                if missing[parameter.key]:
                    wanted.update({key: values[0] for key, values in parameter.when.items()})
            chosen: Setting = {}
            for parameter in self.space:
                if parameter.is_active(chosen):
                    left = missing[parameter.key]
                    chosen[parameter.key] = (left or [wanted.get(parameter.key, parameter.extremes()[0])])[0]
                    del left[:1]
            if chosen in probes:
                break  # what is left counts under no condition that can be met
            probes.append(chosen)
        return probes

    def identity(self) -> dict[str, Any]:
        """Return what must not change in a study: what is tried, and how it is judged."""
        space = {p.key: {"drawn": repr(p.distribution), **({"when": p.when} if p.when else {})} for p in self.space}
        return {"objective": self.objective, "direction": self.direction, "space": space}


def make(classes: Mapping[str, type], described: dict[str, Any], **more: Any) -> Any:
    """Build a sampler or a pruner from its name and its arguments."""
    name, given = described["name"], {key: value for key, value in described.items() if key != "name"}
    return classes[name](**{**DEFAULTS.get(name, {}), **given, **more})


def options(setting: Mapping[str, Any]) -> list[str]:
    """Return a setting as options of fit."""
    return [f"--{key}={plain(value)}" for key, value in setting.items()]


def plain(value: Choice) -> str:
    """Return a value as one types it."""
    return value if isinstance(value, str) else json.dumps(value)


def same(first: Choice, second: Choice) -> bool:
    """Whether two choices are one, where ``1 == True`` is not meant."""
    return type(first) is type(second) and first == second
