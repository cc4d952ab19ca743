"""Splitting of a command line before it is parsed, and parsing of values that several commands share."""

import inspect
import json
import re
from collections.abc import Callable, Mapping

from owl.errors import OwlError

CONFIG = ("--config", "-c")
"""The option of a configuration file; one that is given twice gives two files."""


def split(arguments: list[str]) -> list[tuple[str, str | None]]:
    """Split a command line into options with their values, and words, each of an option without a name."""
    found: list[tuple[str, str | None]] = []
    rest = list(arguments)
    while rest:
        name, has_value, value = rest.pop(0).partition("=")
        if not name.startswith("-"):
            found.append(("", name + has_value + value))
        elif has_value:
            found.append((name, value))
        else:
            ends = not rest or rest[0].startswith("--") or rest[0] in CONFIG
            found.append((name, None if ends else rest.pop(0)))
    return found


def config_files(arguments: list[str]) -> list[str]:
    """Return the files given by ``--config``/``-c``, in order."""
    return [value for name, value in split(arguments) if name in CONFIG and value]


def gather_options(arguments: list[str]) -> list[str]:
    """Gather, for a command that runs fit, what it hands on: ``--config`` and every dotted option.

    ``--config a --config b --model.x 1 --runs r`` becomes ``--runs r --config=["a", "b"] --options=["--model.x=1"]``.
    """
    own, options, files = [], [], config_files(arguments)
    for name, value in split(arguments):
        if name.startswith("--") and "." in name:
            options.append(name if value is None else f"{name}={value}")
        elif name not in CONFIG or not value:
            own += ([name] if name else []) + ([] if value is None else [value])
    own += [f"--config={json.dumps(files)}"] if files else []
    return own + ([f"--options={json.dumps(options)}"] if options else [])


def changed(function: Callable[..., object], values: Mapping[str, object]) -> list[str]:
    """Return the names of the arguments of a function whose values are not the default ones, in the order of values."""
    parameters = inspect.signature(function).parameters
    return [name for name, value in values.items() if value != parameters[name].default]


def parse_size(size: str) -> tuple[int, int]:
    """Parse the option ``--size``, height x width.

    Raises:
        OwlError: It is written in another way, or too small or too large for pictures.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if not match or not all(8 <= int(side) <= 2**14 for side in match.groups()):
        raise OwlError(
            "arguments.size",
            f"--size is {size}, expected height x width such as 96x160 (8 to 16384 each); correct it",
        )
    return int(match[1]), int(match[2])
