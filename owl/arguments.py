"""From jsonargparse's errors to one sentence that names the file, the key and the nearest valid name."""

import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

LONGEST_LIST = 20
"""Valid names are listed in full up to this many; the nearest one is always named."""


class Place(NamedTuple):
    """Where a key stands in a YAML file."""

    file: str
    path: str
    """Dotted path of the key."""
    value: Any
    enclosing_class: str | None
    """The ``class_path`` whose ``init_args`` hold the key, if any."""


def explain(message: str, arguments: list[str], options: list[str]) -> str:
    """Rewrite a jsonargparse error as one sentence.

    Args:
        message: The parser's own message, possibly of many lines (one per member of a Union).
        arguments: The command line; its ``--config`` files are searched for the key at fault.
        options: Every dotted option that the command knows, for suggestions.
    """
    files = config_files(arguments)
    if found := re.search(r"[Oo]ption '([\w.]+)'(?: is not accepted|$)", message, re.MULTILINE):
        return unknown_key(found.group(1), files, options, arguments)
    if found := re.search(r"unrecognized arguments?: (--?[\w.+]+)", message):
        option = found.group(1).lstrip("-").partition("=")[0]
        return f"option --{option} is not known{suggestion(option, options, prefix='--')}"
    if all_found := re.findall(r'Parser key "([\w.]+)":\s*\n\s*Expected (.+?)\. Got value: (.*)', message):
        key, expected, value = all_found[-1]
        place = find_key(key, files, value)
        where = f"{place.file}: key '{place.path}'" if place else f"option --{key}"
        return f"{where} is {value.strip()!r}, but expects {readable_type(expected)}"
    if all_found := re.findall(r"Problem with given class_path '([^']*)':\s*(?!Parser key)(.+)", message):
        class_path, reason = all_found[-1]  # the innermost of nested classes
        return unknown_class(class_path, reason.strip(), files)
    if found := re.search(r"File does not exist: '(.+?)'", message):
        return f"there is no file {found.group(1)!r}; give the path of an existing YAML file"
    if found := re.search(r"Problems parsing config: (.*)", message, re.DOTALL):
        return f"{unreadable_file(files)} is not valid YAML: {found.group(1)}"
    if all_found := re.findall(r"Interpolation key \'(.+?)\' not found", message):
        place = find_value("${" + all_found[0] + "}", files)
        where = f"{place.file}: key '{place.path}'" if place else "an interpolation"
        return f"{where} refers to ${{{all_found[0]}}}, which is not set anywhere{suggestion(all_found[0], options)}"
    if all_found := re.findall(r"fit\.(\w+)|validate\.(\w+)|test\.(\w+)|predict\.(\w+)", message):
        missing = " and ".join("".join(groups) for groups in all_found)
        return f"the configuration has no {missing}; give them in a YAML file with --config"
    return message


def config_files(arguments: list[str]) -> list[str]:
    """Return the files given by ``--config``/``-c``, in order."""
    files = [following for option, following in pairwise(arguments) if option in ("--config", "-c")]
    return files + [a.partition("=")[2] for a in arguments if a.startswith(("--config=", "-c="))]


def suggestion(name: str, valid: list[str], prefix: str = "") -> str:
    """Return ``; did you mean '...'?`` for the nearest valid name, or an empty string."""
    nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean '{prefix}{nearest[0]}'?" if nearest else ""


def unknown_key(key: str, files: list[str], options: list[str], arguments: list[str]) -> str:
    """Describe a key that nothing accepts."""
    leaf = key.rpartition(".")[2]
    place = next((p for p in places(files) if p.path == key), None) or find_key(leaf, files)
    if place is None and "." in key:  # jsonargparse names the first child of an unknown group
        return unknown_key(key.rpartition(".")[0], files, options, arguments)
    if place is None:
        option = next((a.partition("=")[0] for a in arguments if a.partition("=")[0].endswith(f".{key}")), key)
        return f"option {option} is not accepted{suggestion(option.lstrip('-'), options, prefix='--')}"
    group, _, leaf = place.path.rpartition(".")
    if place.enclosing_class:
        valid = parameters(place.enclosing_class)
        owner = f" by {place.enclosing_class}"
    else:
        depth = group.count(".") + 1 if group else 0
        under = [option for option in options if not group or option.startswith(f"{group}.")]
        valid = sorted({option.split(".")[depth].rstrip("+") for option in under if option.count(".") >= depth})
        owner = ""
        if group and not valid:  # the whole group is unknown
            return unknown_key(group, files, options, arguments)
    listed = f" (accepted: {', '.join(valid)})" if len(valid) <= LONGEST_LIST else ""
    return f"{place.file}: key '{place.path}' is not accepted{owner}{suggestion(leaf, valid)}{listed}"


def unknown_class(class_path: str, reason: str, files: list[str]) -> str:
    """Describe a ``class_path`` that cannot be imported or is of another kind."""
    place = find_value(class_path, files)
    where = f"{place.file}: key '{place.path}'" if place else "an option"
    module = class_path.rpartition(".")[0]
    return f"{where} names the class '{class_path}': {reason}{suggestion(class_path, classes_near(module), '')}"


def classes_near(module: str) -> list[str]:
    """Return full paths of the classes in ``module`` or, when it does not exist, in its nearest package's modules."""
    while module:
        try:
            found = importlib.import_module(module)
        except ImportError:
            module = module.rpartition(".")[0]
            continue
        modules = [found]
        for info in pkgutil.iter_modules(getattr(found, "__path__", [])):
            with suppress(ImportError):  # a module that needs an extra which is not installed
                modules.append(importlib.import_module(f"{module}.{info.name}"))
        return [
            f"{m.__name__}.{name}"
            for m in modules
            for name, value in vars(m).items()
            if inspect.isclass(value) and value.__module__ == m.__name__
        ]
    return []


def parameters(class_path: str) -> list[str]:
    """Return the names of a class's constructor arguments."""
    module, _, name = class_path.rpartition(".")
    signature = inspect.signature(getattr(importlib.import_module(module), name))
    return [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def readable_type(expected: str) -> str:
    """Turn ``a <class 'int'>`` into ``an int``."""
    name = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", expected)
    return re.sub(r"^a (?=[aeiou])", "an ", name)


def places(files: list[str]) -> Iterator[Place]:
    """Yield every key of every readable file."""
    for file in files:
        try:
            content = yaml.safe_load(Path(file).read_text())
        except (OSError, yaml.YAMLError):
            continue
        yield from keys_below(file, "", content, None)


def keys_below(file: str, prefix: str, node: Any, enclosing_class: str | None) -> Iterator[Place]:
    """Yield the keys below one node, depth first."""
    if isinstance(node, dict):
        children = [(str(key), value) for key, value in node.items()]
    elif isinstance(node, list):
        children = [(str(position), value) for position, value in enumerate(node)]
    else:
        return
    for key, value in children:
        path = f"{prefix}.{key}" if prefix else key
        yield Place(file, path, value, enclosing_class)
        is_arguments = key == "init_args" and isinstance(node, dict)
        yield from keys_below(file, path, value, node.get("class_path") if is_arguments else None)


def find_key(key: str, files: list[str], value: str | None = None) -> Place | None:
    """Return the last place (later files win) whose path ends in ``key``, with that value where one is given."""
    found = [p for p in places(files) if p.path == key or p.path.endswith(f".{key}")]
    exact = [p for p in found if value is None or str(p.value) == value.strip()]
    return exact[-1] if exact else None


def find_value(value: str, files: list[str]) -> Place | None:
    """Return the first place that holds this text."""
    return next((p for p in places(files) if isinstance(p.value, str) and value in p.value), None)


def unreadable_file(files: list[str]) -> str:
    """Return the first file that is not valid YAML."""
    for file in files:
        try:
            yaml.safe_load(Path(file).read_text())
        except yaml.YAMLError:
            return file
        except OSError:
            continue
    return "the configuration"
