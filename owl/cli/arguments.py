"""From jsonargparse's errors to one sentence that names the file, the key and the nearest valid name."""

import difflib
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml

from owl.errors import OwlError

LONGEST_LIST = 20
"""Valid names are listed in full up to this many; the nearest one is always named."""

UNION = re.compile(
    r'Parser key "([\w.]+)":\s+Does not validate against any of the Union subtypes\n.*\n\s+Errors:\n'
    r"((?:\s+- Expected .*\n)+)\s+Given value type: .*\n\s+Given value: (.*)"
)
"""What the parser says of a value that fits none of several plain types."""


class Place(NamedTuple):
    """Where a key stands in a YAML file."""

    file: str
    path: str
    """Dotted path of the key."""
    value: Any


def explain(message: str, arguments: list[str], options: list[str]) -> OwlError:
    """Rewrite a jsonargparse error as one sentence with a code of its kind.

    Args:
        message: The parser's own message, possibly of many lines (one per member of a Union).
        arguments: The command line; its ``--config`` files are searched for the key at fault.
        options: Every dotted option that the command knows, for suggestions.

    Returns:
        What to raise; of a kind that is not known here the parser's own message, as ``arguments.invalid``.
    """
    files = config_files(arguments)
    if found := re.search(
        r"(?:Group '([\w.]+)' does not accept o|O|o)ption '([\w.]+)'(?: is not accepted|$)", message, re.MULTILINE
    ):
        before = message[: found.start()]  # what encloses the key, from the outside in
        classes = re.findall(r"class_path '([^']*)'", before)
        classes += re.findall(r"^\. Got value: Namespace\(class_path='([^']+)'", message[found.end() :])
        group = found.group(1) or ""
        enclosing = [*re.findall(r'Parser key "([\w.]+)"', before), group] if classes else [group]
        key = ".".join([*filter(None, enclosing), found.group(2)])
        return unknown_key(key, files, options, arguments, classes[-1] if classes else None, group)
    if found := re.search(r"unrecognized arguments?: (?!-)(\S+)", message):
        advice = "give YAML files with --config" if found.group(1).endswith((".yaml", ".yml")) else "see --help"
        return OwlError("arguments.no-option", f"{found.group(1)!r} belongs to no option; {advice}")
    if found := re.search(r'Unexpected config: \["(.+?)"', message):
        return OwlError(
            "arguments.no-config", f"--config is no option of this command; give {found.group(1)} without it"
        )
    if found := re.search(r"Path is not a file: '(.+?)'", message):
        return OwlError(
            "arguments.folder", f"{found.group(1)} is a folder, a YAML file was expected; give one of its files"
        )
    if found := re.search(r"unrecognized arguments?: (--?[\w.+]+)", message):
        option = found.group(1).lstrip("-")
        option = next((name for name in given_options(arguments) if name.endswith(f".{option}")), option)
        head, _, middle = option.rpartition(".")[0].partition(".")
        if chosen := find_key(f"{head}.class_path", files):  # an argument of the class, itself a group
            return unknown_key(option, [], options, arguments, chosen.value, middle)
        near = suggestion(option, options, prefix="--") or "; see --help"
        return OwlError("arguments.unknown-key", f"option --{option} is not known{near}")
    if all_found := re.findall(r'Parser key "([\w.]+)":\s*\n\s*Expected (.+?)\. Got value: (.*)', message):
        key, expected, value = all_found[-1]
        return wrong_value(key, [expected], value, files)
    if found := re.search(r"Expected a path but (\S+\.ya?ml) either not accessible", message):
        named = [place for place in places(files) if place.value == found.group(1)]
        where = f"{named[-1].file}: key '{named[-1].path}'" if named else "an option"
        return OwlError(
            "arguments.missing-file",
            f"{where} names the file {found.group(1)!r}, which is not there; paths are relative to the naming file",
        )
    if found := re.search(r"callable class: (.+)\. Got value: Namespace\(class_path='([^']+)'", message):
        return unknown_class(found.group(2), found.group(1), files)
    if found := re.search(r"(?:class_path '([^']*)':\s*)?the following arguments are required: (.+)", message):
        return missing_key(found.group(2), found.group(1), files)
    if found := re.search(r"argument (\S+): expected one argument", message):
        return OwlError("arguments.missing-value", f"{found.group(1)} has no value; give it one, or leave it out")
    if all_found := re.findall(r"Problem with given class_path '([^']*)':\s*(?!Parser key)(.+)", message):
        class_path, reason = all_found[-1]  # the innermost of nested classes
        return unknown_class(class_path, reason.strip(), files)
    if found := re.search(r"Import path ([\w.]+) does not correspond to a (subclass of \w+)", message):
        return unknown_class(found.group(1), f"not a {found.group(2)}", files)
    if found := re.search(r"File does not exist: '(.+?)'", message):
        return OwlError(
            "arguments.missing-file", f"there is no file {found.group(1)!r}; give the path of an existing YAML file"
        )
    if found := re.search(r"Problems parsing config: (.*)", message, re.DOTALL):
        return OwlError(
            "arguments.not-yaml", f"{unreadable_file(files)} is not valid YAML ({found.group(1)}); correct it"
        )
    if found := re.search(r"Interpolation key '\.*(.+?)' not found.*?full_key: \w+\.([\w.]+)", message, re.DOTALL):
        reference, key = found.groups()
        place = find_key(key, files)
        where = f"{place.file}: key '{place.path}'" if place else f"option --{key}"
        known = [place.path for place in places(files)] + options
        return OwlError(
            "arguments.unknown-reference",
            f"{where} refers to ${{{reference}}}, which is not set anywhere"
            f"{suggestion(reference, known) or '; set it'}",
        )
    if found := re.search(r"^(.+)\n\s+full_key: \w+\.([\w.]+)", message):
        return unresolved(found.group(1), found.group(2), files)
    if found := UNION.search(message):
        key, expectations, value = found.groups()
        return wrong_value(key, re.findall(r"- Expected (.+)", expectations), value, files)
    return OwlError("arguments.invalid", message)


def unresolved(reason: str, key: str, files: list[str]) -> OwlError:
    """Describe a ``${}`` that OmegaConf cannot resolve; ``reason`` is its own."""
    place = find_key(key, files)
    where = f"{place.file}: key '{place.path}'" if place else f"option --{key}"
    if found := re.search(r"Environment variable '(.+?)' not found", reason):
        name = found.group(1)
        return OwlError(
            "arguments.unset-variable",
            f"{where} refers to the environment variable {name}, which is not set; set it, or give a value for that "
            f"case: ${{oc.env:{name},VALUE}}",
        )
    return OwlError(
        "arguments.bad-reference",
        f"{where} holds a reference that cannot be resolved ({reason}); write ${{KEY}} or ${{oc.env:VARIABLE}}",
    )


def config_files(arguments: list[str]) -> list[str]:
    """Return the files given by ``--config``/``-c``, in order."""
    files = []
    for argument, following in pairwise([*arguments, ""]):
        option, has_value, value = argument.partition("=")
        if option in ("--config", "-c"):
            files.append(value if has_value else following)
    return files


def gather_options(arguments: list[str]) -> list[str]:
    """Gather, for a command that runs fit, what it hands on: ``--config`` and every dotted option.

    ``--config a --config b --model.x 1 --runs r`` becomes ``--runs r --config=["a", "b"] --options=["--model.x=1"]``.
    """
    own: list[str] = []
    files: list[str] = []
    options: list[str] = []
    rest = list(arguments)
    while rest:
        option, has_value, value = rest.pop(0).partition("=")
        dotted = option.startswith("--") and "." in option
        if (dotted or option in ("--config", "-c")) and not has_value and rest and not rest[0].startswith("--"):
            has_value, value = "=", rest.pop(0)
        if dotted:
            options.append(option + has_value + value)
        elif option in ("--config", "-c") and has_value:
            files.append(value)
        else:
            own.append(option + has_value + value)
    own += [f"--config={json.dumps(files)}"] if files else []
    return own + ([f"--options={json.dumps(options)}"] if options else [])


def given_options(arguments: list[str]) -> list[str]:
    """Return the names of the options on a command line."""
    return [a.lstrip("-").partition("=")[0] for a in arguments if a.startswith("--")]


def suggestion(name: str, valid: list[str], prefix: str = "") -> str:
    """Return ``; did you mean '...'?`` for the nearest valid name, or an empty string."""
    nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean '{prefix}{nearest[0]}'?" if nearest else ""


def unknown_key(
    key: str, files: list[str], options: list[str], arguments: list[str], class_path: str | None = None, group: str = ""
) -> OwlError:
    """Describe a key that nothing accepts.

    Args:
        key: Dotted path, without ``init_args`` where the parser left it out.
        files: Where it may stand.
        options: Every dotted option of the command.
        arguments: Where it may stand otherwise.
        class_path: The class that does not accept it, if it is an argument of one.
        group: Which of the class's arguments, themselves groups, the key is in.
    """
    found = [place for place in places(files) if spoken(place.path) == spoken(key)]
    if not found and "." in key and class_path is None:  # jsonargparse names the first child of an unknown group
        return unknown_key(key.rpartition(".")[0], files, options, arguments)
    if found:
        where, path = f"{found[-1].file}: key '{found[-1].path}'", found[-1].path
    else:
        path = next((name for name in given_options(arguments) if name.endswith(f".{key}")), key)
        where = f"option --{path}"
    above, _, leaf = path.rpartition(".")
    if class_path:
        valid = parameters(class_path, group)
    else:
        depth = above.count(".") + 1 if above else 0
        under = [option for option in options if not above or option.startswith(f"{above}.")]
        valid = sorted({option.split(".")[depth].rstrip("+") for option in under if option.count(".") >= depth})
        if above and not valid:  # the whole group is unknown
            return unknown_key(above, files, options, arguments)
    owner = f" by {class_path}" if class_path else ""
    listed = f" (accepted: {', '.join(valid)})" if len(valid) <= LONGEST_LIST else ""
    return OwlError("arguments.unknown-key", f"{where} is not accepted{owner}{suggestion(leaf, valid)}{listed}")


def spoken(path: str) -> str:
    """Return a path as options and the parser's messages say it: ``model.network.size``."""
    return ".".join(part for part in path.split(".") if part != "init_args" and not part.isdigit())


def missing_key(names: str, class_path: str | None, files: list[str]) -> OwlError:
    """Describe arguments that have no default and were not given: of a class where one is named, else of a command."""
    if parts := re.findall(r"\b(?:fit|validate|test|predict)\.(\w+)", names):
        missing = " and ".join(parts)
        return OwlError(
            "arguments.missing-key", f"the configuration has no {missing}; give them in a YAML file with --config"
        )
    if class_path is None:
        return OwlError("arguments.missing-key", f"{names} must be given; see --help")
    named = [place for place in places(files) if place.value == class_path]
    where = f"{named[-1].file}: key '{named[-1].path.removesuffix('class_path')}init_args'" if named else "an option"
    return OwlError("arguments.missing-key", f"{where} gives {class_path} no {names}, which it needs; add it there")


def unknown_class(class_path: str, reason: str, files: list[str]) -> OwlError:
    """Describe a ``class_path`` that cannot be imported or is of another kind."""
    named = [place for place in places(files) if place.value == class_path]
    where = f"{named[-1].file}: key '{named[-1].path}'" if named else "an option"
    others = [name for name in classes_near(class_path.rpartition(".")[0]) if name != class_path]
    near = suggestion(class_path, others) or "; name another class"
    return OwlError("arguments.unknown-class", f"{where} names the class '{class_path}' ({reason}){near}")


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
            if inspect.isclass(value) and value.__module__.startswith(m.__name__)  # its own, and those it passes on
        ]
    return []


def parameters(class_path: str, group: str = "") -> list[str]:
    """Return the names of a class's constructor arguments, or of those of its argument ``group``, itself a class."""
    module, _, name = class_path.rpartition(".")
    owner = getattr(importlib.import_module(module), name)
    for part in group.split("."):
        if part in ("", "init_args"):  # an option may spell init_args out or leave it out
            continue
        owner = get_type_hints(owner.__init__)[part]
    signature = inspect.signature(owner)
    return [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def wrong_value(key: str, expectations: list[str], value: str, files: list[str]) -> OwlError:
    """Describe a value of the wrong type, or that is none of those that can be chosen."""
    place = find_key(key, files, value)
    where = f"{place.file}: key '{place.path}'" if place else f"option --{key}"
    choices = [choice for expected in expectations for choice in literals(expected)]
    accepted = [readable_type(expected) for expected in expectations if not literals(expected)]
    if choices:
        accepted.append(f"one of {', '.join(choices)}")
    near = suggestion(value.strip(), choices)
    return OwlError("arguments.wrong-value", f"{where} is {value.strip()!r}, but expects {' or '.join(accepted)}{near}")


def literals(expected: str) -> list[str]:
    """Return the choices in ``a typing.Literal['min', 'max']``, none of any other type."""
    found = re.search(r"Literal\[(.*)\]", expected)
    return [choice.strip("'") for choice in found.group(1).split(", ")] if found else []


def readable_type(expected: str) -> str:
    """Turn ``a <class 'int'>`` into ``an int``."""
    name = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", expected)
    return "null" if name.endswith("NoneType") else re.sub(r"^a (?=[aeiou])", "an ", name)


def places(files: list[str]) -> Iterator[Place]:
    """Yield every key of every readable file."""
    for file in files:
        try:
            content = yaml.safe_load(Path(file).read_bytes())
        except (OSError, yaml.YAMLError):
            continue
        yield from keys_below(file, "", content)


def keys_below(file: str, prefix: str, node: Any) -> Iterator[Place]:
    """Yield the keys below one node, depth first."""
    if isinstance(node, dict):
        children = [(str(key), value) for key, value in node.items()]
    elif isinstance(node, list):
        children = [(str(position), value) for position, value in enumerate(node)]
    else:
        return
    for key, value in children:
        path = f"{prefix}.{key}" if prefix else key
        yield Place(file, path, value)
        yield from keys_below(file, path, value)


def find_key(key: str, files: list[str], value: str | None = None) -> Place | None:
    """Return the last place (later files win) whose path ends in ``key``, with that value where one is given."""
    found = [p for p in places(files) if p.path == key or p.path.endswith(f".{key}")]
    exact = [p for p in found if value is None or str(p.value) == value.strip()]
    return exact[-1] if exact else None


def unreadable_file(files: list[str]) -> str:
    """Return the first file that is not valid YAML."""
    for file in files:
        try:
            yaml.safe_load(Path(file).read_bytes())
        except yaml.YAMLError:
            return file
        except OSError:
            continue
    return "the configuration"
