"""Reading a sweep's YAML, with one sentence for every mistake in it."""

import difflib
import inspect
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning

from owl.errors import OwlError
from owl.sweep.plan import PRUNERS, SAMPLERS, Choice, Direction, Parameter, Plan, make, plain, same

LARGEST_GRID = 10_000
KEYS = ("name", "objective", "direction", "trials", "sampler", "pruner", "seed", "storage", "space")
RANGE_KEYS = ("low", "high", "log", "step", "type", "choices", "when")
RESERVED = ("config", "name", "runs", "ckpt_path", "overwrite")
"""Options of fit that a sweep sets itself."""
MISSING = {
    "objective": "name the logged metric that decides, such as objective: val/psnr",
    "direction": "say direction: maximize or direction: minimize",
    "space": "give at least one dotted key of the experiment with {low, high} or {choices}",
}


def load_plan(path: str | Path, trials: int | None = None) -> Plan:
    """Read a sweep's YAML.

    Args:
        path: The file.
        trials: Replaces the file's number of trials.

    Raises:
        OwlError: The file is missing, or something in it is not as docs/how-to/sweep.md says.
    """
    try:
        content = yaml.safe_load(Path(path).read_bytes())
    except OSError as error:
        raise OwlError(
            "arguments.missing-file", f"there is no file {str(path)!r}; give a sweep's YAML with --sweep"
        ) from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise OwlError("arguments.not-yaml", f"{path} is not valid YAML ({reason}); correct it") from error
    try:
        return parse_plan(content, Path(path).stem, trials)
    except Mistake as error:
        raise OwlError("sweep.file", f"{path}: {error}") from error


class Mistake(Exception):
    """What is wrong in a sweep's YAML, without the name of the file."""


def parse_plan(content: Any, name: str, trials: int | None) -> Plan:
    """Turn the content of a sweep's YAML into a plan.

    Args:
        content: The content.
        name: Of the sweep, unless the content names it.
        trials: Replaces the content's number of trials.

    Raises:
        Mistake: Something is not as it should be.
    """
    if not isinstance(content, dict):
        raise Mistake(f"a mapping was expected; give at least {', '.join(('objective', 'direction', 'space'))}")
    refuse_unknown(content, KEYS, "")
    for key in ("objective", "direction", "space"):
        if not content.get(key):
            raise Mistake(f"key '{key}' is missing; {MISSING[key]}")
    direction = one_of(content["direction"], get_args(Direction), "direction")
    space = parse_space(content["space"])
    sampler = described(content.get("sampler", "tpe"), SAMPLERS, "sampler")
    pruner = described(content.get("pruner", "none"), PRUNERS, "pruner")
    seed = whole(content.get("seed", 0), "seed", 0)
    given = content.get("trials") if trials is None else trials
    plan = Plan(
        name=str(content.get("name", name)),
        objective=str(content["objective"]),
        direction=cast(Direction, direction),
        trials=0 if given is None else whole(given, "trials", 1),
        sampler=sampler,
        pruner=pruner,
        seed=seed,
        storage=content.get("storage"),
        space=space,
    )
    if not plan.name or plan.name.startswith((".", "/")):
        raise Mistake(f"key 'name' is {plan.name!r}, a name for the folder runs/<name> was expected; correct it")
    if sampler["name"] == "grid":
        points = grid_size(plan)
        return Plan(**{**plan.__dict__, "trials": points if given is None else min(points, plan.trials)})
    if given is None:
        raise Mistake("key 'trials' is missing; give the number of trials (only a grid counts them itself)")
    if sampler["name"] == "cmaes" and all(isinstance(p.distribution, CategoricalDistribution) for p in space):
        raise Mistake("sampler 'cmaes' moves through numbers, but every key of the space has choices; take 'tpe'")
    return plan


def grid_size(plan: Plan) -> int:
    """Count the settings of a grid.

    Raises:
        Mistake: They cannot be counted, or are too many.
    """
    for parameter in plan.space:
        if parameter.points() is None:
            raise Mistake(
                f"key 'space.{parameter.key}' is a continuous range, which sampler 'grid' cannot count; give it "
                "choices or a step, or take 'tpe' or 'random'"
            )
    points = 0
    for _ in plan.grid():
        points += 1
        if points > LARGEST_GRID:
            raise Mistake(f"the grid has more than {LARGEST_GRID:,} settings; take larger steps, or 'tpe' or 'random'")
    return points


def parse_space(content: Any) -> list[Parameter]:
    """Read the search space; conditions refer upwards.

    Raises:
        Mistake: A range is not as it should be.
    """
    if not isinstance(content, dict):
        raise Mistake("key 'space' is no mapping; give dotted keys of the experiment with {low, high} or {choices}")
    space: list[Parameter] = []
    for key, described_range in content.items():
        where = f"space.{key}"
        if key in RESERVED:
            raise Mistake(f"key '{where}' cannot be searched, since the sweep sets it itself; remove it")
        if not isinstance(described_range, dict):
            raise Mistake(f"key '{where}' is {described_range!r}, expected {{low, high}} or {{choices: [...]}}")
        refuse_unknown(described_range, RANGE_KEYS, f"{where}.")
        when = parse_condition(described_range.get("when") or {}, where, space)
        rest = {k: v for k, v in described_range.items() if k != "when"}
        space.append(Parameter(str(key), parse_range(rest, where), when))
    return space


def parse_range(content: dict[str, Any], where: str) -> BaseDistribution:
    """Read choices or a range of numbers.

    Raises:
        Mistake: They contradict themselves.
    """
    if "choices" in content:
        if len(content) > 1:
            other = next(key for key in content if key != "choices")
            raise Mistake(f"key '{where}' has both choices and {other}; keep one of them")
        choices = content["choices"]
        if not isinstance(choices, list) or not choices:
            raise Mistake(f"key '{where}.choices' is {choices!r}, expected a list with at least one value")
        encoded = [encode(choice) for choice in choices]
        if len({plain(choice) for choice in encoded}) < len(encoded):
            raise Mistake(f"key '{where}.choices' names a value twice; remove one")
        return CategoricalDistribution(encoded)
    for name in ("low", "high"):
        if name not in content:
            raise Mistake(f"key '{where}' has no {name}; give low and high, or choices")
    low, high = (number(content[name], f"{where}.{name}") for name in ("low", "high"))
    step = None if content.get("step") is None else number(content["step"], f"{where}.step")
    log = content.get("log", False)
    if not isinstance(log, bool):
        raise Mistake(f"key '{where}.log' is {log!r}, expected true or false")
    numbers = [value for value in (low, high, step) if value is not None]
    kind = one_of(content["type"], ("int", "float"), f"{where}.type") if "type" in content else None
    if kind is None:
        kind = "int" if all(isinstance(value, int) for value in numbers) else "float"
    if kind == "int" and not all(float(value).is_integer() for value in numbers):
        raise Mistake(f"key '{where}' is of type int, but one of low, high and step has a fraction; correct it")
    if low > high:
        raise Mistake(f"key '{where}' has low {low:g} above high {high:g}; exchange them")
    if log and low <= 0:
        raise Mistake(f"key '{where}' has log: true and low {low:g}; a logarithmic range begins above 0")
    if log and step is not None:
        raise Mistake(f"key '{where}' has log: true and a step; keep one of them")
    if step is not None and step <= 0:
        raise Mistake(f"key '{where}.step' is {step:g}, expected more than 0")
    if step is not None and not math.isclose((high - low) / step, round((high - low) / step), abs_tol=1e-6):
        raise Mistake(f"key '{where}' cannot reach high {high:g} from low {low:g} in steps of {step:g}; change one")
    if kind == "int":
        return IntDistribution(int(low), int(high), log=log, step=int(step or 1))
    return FloatDistribution(float(low), float(high), log=log, step=None if step is None else float(step))


def parse_condition(content: Any, where: str, above: list[Parameter]) -> dict[str, list[Choice]]:
    """Read ``when: {key: value}`` or ``when: {key: [value, value]}``.

    Raises:
        Mistake: It names no key further up, or a value that is none of its choices.
    """
    if not isinstance(content, dict):
        raise Mistake(f"key '{where}.when' is {content!r}, expected {{key: value}}")
    found: dict[str, list[Choice]] = {}
    for key, wanted in content.items():
        parent = next((p for p in above if p.key == key), None)
        if parent is None:
            near = nearest(str(key), [p.key for p in above])
            raise Mistake(f"key '{where}.when' names '{key}', which does not stand above it in the space{near}")
        if not isinstance(parent.distribution, CategoricalDistribution):
            raise Mistake(f"key '{where}.when' names '{key}', which is a range; only a key with choices can decide")
        choices = list(parent.distribution.choices)
        single = any(same(encode(wanted), choice) for choice in choices)
        values = [encode(v) for v in (wanted if isinstance(wanted, list) and not single else [wanted])]
        for value in values:
            if not any(same(value, choice) for choice in choices):
                near = nearest(plain(value), map(plain, choices))
                raise Mistake(
                    f"key '{where}.when' expects {plain(value)} of '{key}', which is none of its choices{near}"
                )
        found[key] = values
    return found


def encode(choice: Any) -> Choice:
    """Lists and mappings as JSON, which fit reads like YAML; studies store plain values only."""
    return json.dumps(choice) if isinstance(choice, list | dict) else choice


def number(value: Any, where: str) -> int | float:
    """Read a number.

    Raises:
        Mistake: It is none.
    """
    if isinstance(value, str):  # YAML 1.1 takes 1e-3 for text, since it has no point
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Mistake(f"key '{where}' is {value!r}, expected a number")
    return value


def whole(value: Any, where: str, least: int) -> int:
    """Read a whole number.

    Raises:
        Mistake: It is none, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise Mistake(f"key '{where}' is {value!r}, expected a whole number of at least {least}")
    return value


def described(content: Any, classes: Mapping[str, type], what: str) -> dict[str, Any]:
    """Read a sampler or a pruner: its name, or a mapping with its name and arguments of its class.

    Raises:
        Mistake: There is none of that name, or its class takes no such argument.
    """
    content = {"name": content} if isinstance(content, str) or content is None else content
    if not isinstance(content, dict):
        raise Mistake(f"key '{what}' is {content!r}, expected one of: {', '.join(classes)}")
    content = {**content, "name": one_of(str(content.get("name")).lower(), tuple(classes), what)}
    chosen = classes[content["name"]]
    known = [p for p in inspect.signature(chosen).parameters if p != "seed"]
    refuse_unknown(content, ("name", *known), f"{what}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            make(classes, content)
    except (TypeError, ValueError) as error:
        raise Mistake(f"key '{what}': {' '.join(str(error).split())}") from error
    return content


def one_of(value: Any, names: tuple[str, ...], where: str) -> str:
    """Read a name.

    Raises:
        Mistake: It is none of those that there are.
    """
    if value not in names:
        raise Mistake(f"key '{where}' is {value!r}{nearest(str(value), names)} (accepted: {', '.join(names)})")
    return str(value)


def refuse_unknown(content: dict[str, Any], names: tuple[str, ...], prefix: str) -> None:
    """Refuse keys that nothing reads.

    Raises:
        Mistake: There is one.
    """
    for key in content:
        if key not in names:
            raise Mistake(
                f"key '{prefix}{key}' is not accepted{nearest(str(key), names)} (accepted: {', '.join(names)})"
            )


def nearest(name: str, names: Iterable[str]) -> str:
    """Return ``; did you mean '...'?`` for the nearest name, or an empty string."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.4)
    return f"; did you mean '{found[0]}'?" if found else ""
