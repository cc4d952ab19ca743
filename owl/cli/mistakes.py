"""One-sentence errors for settings that the parser rejects, with the file, the key and the nearest valid name.

The parser's messages are prose, with a paragraph for each member of a Union. They are not read: the files and options
are merged again and compared, key by key, with the arguments of the parser and of the classes that they name. The first
mismatch becomes the error.
"""

import argparse
import collections.abc
import difflib
import importlib
import inspect
import os
import pkgutil
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from owl.cli.arguments import CONFIG, config_files, split
from owl.errors import OwlError, suggestion

LONGEST_LIST = 20
"""Valid names are listed in full up to this many; the nearest one is always named."""
NEAR = 0.5
"""Least similarity of a name that is suggested."""
UNKNOWN = (ImportError, AttributeError, TypeError, ValueError)
"""Errors of importing a class that does not exist."""


T = TypeVar("T")


class Setting(NamedTuple):
    """A value, which may be a dict or a list of settings, and the key or option that gave it."""

    where: str
    value: Any
    folder: Path | None = None
    """Folder of the file that contains it; None for an option."""


def explain(error: Exception, arguments: list[str], parser: ArgumentParser) -> OwlError:
    """Return the error for settings that a parser rejected.

    Args:
        error: Error of the parser.
        arguments: The command line, without the command.
        parser: Parser of the command.

    Returns:
        The error to raise; if no mistake is found, the parser's message as ``arguments.invalid``.
    """
    cause = error.__cause__
    while cause is not None:
        if isinstance(cause, argparse.ArgumentError) and cause.argument_name:  # too few values
            option = cause.argument_name.rpartition("/")[2]
            return OwlError("arguments.missing-value", f"{option} has no value; give it one, or leave it out")
        cause = cause.__cause__
    try:
        settings = gather_settings(arguments, parser)
        if isinstance(error, OmegaConfBaseException):
            return bad_reference(error, settings, parser)
        found = mistake_in(settings.value, parser) or missing_argument(settings.value, parser)
    except OwlError as mistake:
        return mistake
    reason = " ".join(str(error).split())
    return found or OwlError("arguments.invalid", f"the settings are rejected ({reason}); see --help")


def gather_settings(arguments: list[str], parser: ArgumentParser) -> Setting:
    """Merge files and options, the later over the earlier.

    Raises:
        OwlError: A file does not exist, or a word belongs to no option.
    """
    settings = Setting("", {})
    takes_files = any(isinstance(action, ActionConfigFile) for action in parser._actions)
    for file in map(Path, config_files(arguments) if takes_files else []):
        if file.is_dir():
            raise OwlError("arguments.folder", f"'{file}' is a folder, expected a YAML file; give one of its files")
        if not file.is_file():
            raise OwlError("arguments.missing-file", f"there is no file '{file.absolute()}'; give an existing one")
        given = read(file)
        settings = merged(settings, given) if isinstance(given.value, dict) else settings
    positions = [action.dest for action in parser._actions if not action.option_strings]
    for name, text in split(arguments):
        if not name and not positions:
            advice = "give YAML files with --config" if str(text).endswith((".yaml", ".yml")) else "see --help"
            raise OwlError("arguments.no-option", f"{text!r} belongs to no option; {advice}")
        if not (takes_files and name in CONFIG):
            name = name or positions.pop(0)
            setting = Setting(f"option {name}", text)
            with suppress(yaml.YAMLError):
                setting = placed(yaml.safe_load(text), setting.where) if text and text[0] in "[{" else setting
            for key in reversed(name.lstrip("-").split(".")):
                setting = Setting(f"option {name}", {key: setting})
            settings = merged(settings, setting)
    return settings


def read(file: Path) -> Setting:
    """Read the settings of a YAML file."""
    try:
        content = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        raise OwlError("arguments.not-yaml", f"{file} is not valid YAML ({error}); correct it there") from error
    return placed(content, str(file), file.parent)


def placed(value: Any, source: str, folder: Path | None = None, path: str = "") -> Setting:
    """Add the place of a value and of all values in it: an option, or a file of ``folder``."""
    if isinstance(value, dict):
        value = {str(key): placed(part, source, folder, f"{path}.{key}".lstrip(".")) for key, part in value.items()}
    elif isinstance(value, list):
        value = [placed(part, source, folder, f"{path}.{position}") for position, part in enumerate(value)]
    return Setting(f"{source}: key '{path}'" if folder else source, value, folder)


def loaded(setting: Setting) -> Setting:
    """Return the settings of a YAML file that is named instead of keys; other settings are returned unchanged."""
    if not isinstance(setting.value, str) or not setting.value.endswith((".yaml", ".yml")):
        return setting
    file = (setting.folder or Path()) / setting.value
    return read(file) if file.is_file() else setting


def merged(old: Setting | None, new: Setting) -> Setting:
    """Override an earlier setting: key by key, and with keys of options the last object of a list."""
    old = loaded(old or Setting("", None))
    before, after = old.value, new.value
    if isinstance(after, str) and isinstance(before, dict) and "class_path" in before:
        content = loaded(new).value
        after = content if isinstance(content, dict) else {"class_path": new}
    if not isinstance(after, dict):
        return new
    if isinstance(before, list) and before:
        return Setting(new.where, [*before[:-1], merged(before[-1], new)])
    both: dict[str, Setting]
    both = dict(before) if isinstance(before, dict) else {"class_path": old} if isinstance(before, str) else {}
    if "class_path" in both and "class_path" in after and both["class_path"].value != after["class_path"].value:
        with suppress(*UNKNOWN):  # the other class keeps the arguments that it also accepts
            parser, former = parser_of(imported(after["class_path"].value)), object_arguments(both)
            kept = {name: part for name, part in former.items() if fits(part, name, parser)}
            both = {"init_args": Setting(new.where, kept)}
    for key, setting in after.items():
        if key.endswith("+"):
            more = setting.value if isinstance(setting.value, list) else [setting]
            both[key[:-1]] = Setting(setting.where, [*both.get(key[:-1], Setting("", [])).value, *more])
        else:
            both[key] = merged(both.get(key), setting)
    return Setting(new.where, both)


def object_arguments(settings: dict[str, Setting]) -> dict[str, Setting]:
    """Return the arguments of an object, including those that options give without ``init_args``."""
    inner = settings.get("init_args", Setting("", {}))
    rest = {key: s for key, s in settings.items() if key not in ("class_path", "init_args", "dict_kwargs")}
    return merged(inner, Setting(inner.where, rest)).value


def plain(setting: Setting) -> Any:
    """Return a value without its places."""
    if isinstance(setting.value, dict):
        return {key: plain(part) for key, part in setting.value.items()}
    return [plain(part) for part in setting.value] if isinstance(setting.value, list) else setting.value


def below(setting: Setting, path: str = "") -> Iterator[tuple[str, Setting]]:
    """Yield the dotted path of every key and position below a setting, with its setting."""
    value = setting.value
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield f"{path}{key}", part
        yield from below(part, f"{path}{key}.")


def parser_of(kind: Any, skip: int = 0) -> ArgumentParser:
    """Return a parser of the arguments of a class or a factory function, without the first ``skip``."""
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(kind) else parser.add_function_arguments
    add(kind, skip={skip} if skip else None, fail_untyped=False)
    return parser


def build(kind: type[T], settings: Setting) -> T:
    """Build an object, such as a dataclass, whose arguments are the keys of a YAML file; a key with null is omitted.

    Raises:
        OwlError: A key or the type of a value is wrong, a key is missing, or the object rejects the values.
    """
    given = {key: setting for key, setting in settings.value.items() if setting.value is not None}
    parser = parser_of(kind)
    named = Setting(settings.where, kind.__name__)
    if mistake := mistake_in(given, parser) or missing_argument(given, parser, named):
        raise mistake
    try:
        return kind(**parser.instantiate(parser.parse_object(plain(Setting("", given)))))
    except OwlError as error:
        error.message = f"{settings.where}: {error.message}"
        raise


def names_below(parser: ArgumentParser, prefix: str = "") -> list[str]:
    """Return the names that a parser accepts below ``prefix``, which is empty or ends in a dot."""
    names = (action.dest.removeprefix(prefix) for action in parser._actions if action.dest.startswith(prefix))
    return list(dict.fromkeys(name.partition(".")[0] for name in names if not name.endswith("help")))


def fits(setting: Setting, key: str, parser: ArgumentParser) -> bool:
    """Return whether a parser accepts a value for a key."""
    try:
        parser.validate(Namespace({key: plain(setting)}), skip_required=True)
    except (TypeError, ValueError, KeyError, argparse.ArgumentError):
        return False
    return True


def mistake_in(
    settings: dict[str, Setting], parser: ArgumentParser, prefix: str = "", owner: str = ""
) -> OwlError | None:
    """Return the error for the first setting that a parser rejects; ``owner`` is the class of the arguments, if any."""
    valid = names_below(parser, prefix)
    for name, setting in settings.items():
        key, found = prefix + name, None
        if name not in valid:
            found = unknown_key(setting, name, valid, prefix, owner)
        elif names_below(parser, f"{key}."):  # a section
            setting = loaded(setting)
            if isinstance(setting.value, dict):
                inner = object_arguments(setting.value) if owner else setting.value
                found = mistake_in(inner, parser, f"{key}.", owner)
            elif owner or setting.value is not None:
                found = no_keys(setting)
        elif not fits(setting, key, parser):
            action = next(action for action in parser._actions if action.dest == key)
            found = misfit(setting, getattr(action, "_typehint", action.type), action.default)
        if found:
            return found
    return None


def misfit(setting: Setting, hint: Any, default: Any = None) -> OwlError | None:
    """Return the error for a value that does not match a type; None if it matches or contains a reference."""
    value, members = setting.value, [hint]
    for member in members:  # which grows by those of Unions
        members += get_args(member) if get_origin(member) in (Union, UnionType) else ()
    members = [member for member in members if get_origin(member) not in (Union, UnionType)]
    mappings = [member for member in members if get_origin(member) in (dict, collections.abc.Mapping)]
    others = [member for member in members if member not in mappings]
    bases = {base: skip for member in others for base, skip in bases_in(member).items()}
    simple = any(not bases_in(member) and member is not NoneType for member in others)
    parts: list[tuple[Setting, Any]] = []
    if isinstance(value, list) and (inner := [m for m in others if bases_in(m) and get_args(m)]):
        parts = [(part, get_args(inner[0])[0]) for part in value]
    if isinstance(value, dict) and (inner := [m for m in mappings if bases_in(m)]):
        parts = [(part, get_args(inner[0])[1]) for part in value.values()]
    if parts:
        return next(filter(None, (misfit(part, kind) for part, kind in parts)), None)
    if bases and (isinstance(value, dict) or (isinstance(value, str) and ("." in value or not simple))):
        return object_mistake(setting, bases, default)
    return None if "${" in str(value) else wrong_value(setting, members)


def bases_in(hint: Any) -> dict[type, int]:
    """Return the classes whose objects a type accepts, with the number of arguments that a Callable passes later."""
    members = get_args(hint)
    if get_origin(hint) is collections.abc.Callable:
        return dict.fromkeys(bases_in(members[-1]), len(members[0]) if isinstance(members[0], list) else 0)
    if inspect.isclass(hint) and not members and hint.__module__ not in ("builtins", "typing"):
        return {hint: 0}
    return {base: skip for member in members for base, skip in bases_in(member).items()}


def object_mistake(setting: Setting, bases: dict[type, int], default: Any) -> OwlError | None:
    """Return the error for keys that describe an object, or for the path of its class alone."""
    setting = loaded(setting)
    settings = setting.value if isinstance(setting.value, dict) else {"class_path": setting}
    base, skip = next(iter(bases.items()))
    implied = default.get("class_path") if isinstance(default, dict | Namespace) else None
    named = settings.get("class_path", Setting(setting.where, implied or f"{base.__module__}.{base.__qualname__}"))
    if str(named.value).endswith((".yaml", ".yml")):
        return no_keys(named)
    try:
        kind = imported(str(named.value), list(bases))
    except UNKNOWN as error:
        return unknown_class(named, str(error))
    if not callable(kind) or (inspect.isclass(kind) and not issubclass(kind, tuple(bases))):
        return unknown_class(named, f"not a subclass of {base.__name__}")
    inner = settings.get("init_args")
    if inner and not isinstance(inner.value, dict | NoneType):
        return no_keys(inner)
    parser, arguments = parser_of(kind, skip), object_arguments(settings)
    return mistake_in(arguments, parser, owner=named.value) or missing_argument(arguments, parser, named)


def imported(class_path: str, bases: list[type] | None = None) -> Any:
    """Import a class by its path; for a subclass of ``bases`` the name is sufficient.

    Raises:
        Exception: One of UNKNOWN, if it does not exist.
    """
    module, _, name = class_path.rpartition(".")
    known = [] if module else list(bases or ())
    for base in known:  # which grows
        if base.__name__ == name:
            return base
        known += base.__subclasses__()
    if not module:
        raise ImportError("no class of that name is known")
    return getattr(importlib.import_module(module), name)


def missing_argument(
    settings: dict[str, Setting], parser: ArgumentParser, named: Setting | None = None
) -> OwlError | None:
    """Return the error for missing arguments without a default, of the named class or of the command."""
    required = {action.dest for action in parser._actions if action.required} | parser._extra_required_keys
    missing = " and ".join(sorted({key.partition(".")[0] for key in required} - settings.keys()))
    if not missing:
        return None
    if named is None:
        return OwlError("arguments.missing-key", f"{missing} must be given; see --help")
    where = named.where.replace("class_path'", "init_args'")
    return OwlError("arguments.missing-key", f"{where} gives {named.value} no {missing}, which it needs; add it there")


def unknown_key(setting: Setting, name: str, valid: list[str], prefix: str, owner: str) -> OwlError:
    """Return the error for an unknown key, with the accepted ones."""
    by = f" by {owner}" if owner else ""
    near = suggestion(name, valid, f"--{prefix}" if setting.where.startswith("option") and not owner else "", NEAR)
    listed = sorted(name for name in valid if not name.startswith("print_"))
    advice = near + f" (accepted: {', '.join(listed)})" if len(listed) <= LONGEST_LIST else near or "; see --help"
    return OwlError("arguments.unknown-key", f"{setting.where} is not accepted{by}{advice}")


def unknown_class(named: Setting, reason: str) -> OwlError:
    """Return the error for a class that cannot be imported or is of another kind, with the nearest one."""
    near, module = "", None
    for part in str(named.value).split("."):
        modules = [info.name for info in pkgutil.iter_modules(getattr(module, "__path__", []))]
        classes = [name for name, value in getattr(module, "__dict__", {}).items() if inspect.isclass(value)]
        nearest = difflib.get_close_matches(part, [*modules, *classes] if module else [part], n=1, cutoff=NEAR)
        near = f"{near}.{nearest[0]}".lstrip(".") if nearest else ""
        if not near:
            break
        with suppress(ImportError):
            module = importlib.import_module(near)
    advice = f"did you mean '{near}'?" if near not in ("", named.value) else "name another class"
    return OwlError("arguments.unknown-class", f"{named.where} names the class '{named.value}' ({reason}); {advice}")


def no_keys(setting: Setting) -> OwlError:
    """Return the error for a value in the place of keys; words name a file."""
    found = str(plain(setting))
    if isinstance(setting.value, str) and not re.fullmatch(r"-?[\d.]+|true|false|null", setting.value):
        advice = "which does not exist; paths are relative to the naming file"
        return OwlError("arguments.missing-file", f"{setting.where} names the file {found!r}, {advice}")
    return OwlError("arguments.no-mapping", f"{setting.where} holds {found!r}, expected keys with values below it")


def wrong_value(setting: Setting, accepted: list[Any]) -> OwlError:
    """Return the error for a value that has none of the accepted types, or is none of the choices."""
    choices = [str(choice) for hint in accepted if get_origin(hint) is Literal for choice in get_args(hint)]
    types = [hint for hint in accepted if get_origin(hint) is not Literal]
    expected = [f"one of {', '.join(choices)}"] if choices else []
    for hint in reversed(types):
        name = hint.__name__ if inspect.isclass(hint) and not get_args(hint) else str(hint)
        expected.insert(0, "null" if hint is NoneType else f"an {name}" if name[0] in "aeiou" else f"a {name}")
    value = str(plain(setting))
    message = (
        f"{setting.where} is {value!r}, but expects {' or '.join(expected)}{suggestion(value, choices, cutoff=NEAR)}"
    )
    return OwlError("arguments.wrong-value", message)


def bad_reference(error: OmegaConfBaseException, settings: Setting, parser: ArgumentParser) -> OwlError:
    """Return the error for a ``${}`` that cannot be resolved, with its place and the reason."""
    key = (error.full_key or "").partition(".")[2].replace("[", ".").replace("]", "")  # without the command
    known, short = dict(below(settings)), key.replace(".init_args", "")  # as in options
    where, value, _ = known.get(key) or known.get(short) or Setting(f"option --{short}", "")
    references = re.findall(r"\$\{\.*([^{}]+)\}", str(value))
    for name in (reference.removeprefix("oc.env:") for reference in references if reference.startswith("oc.env:")):
        if "," not in name and name not in os.environ:
            message = f"refers to the variable {name}, which is not set; set it, or write ${{oc.env:{name},VALUE}}"
            return OwlError("arguments.unset-variable", f"{where} {message}")
    names = [*known, *(action.dest for action in parser._actions)]
    unknown = [reference for reference in references if reference not in names]
    if unknown and isinstance(error, InterpolationKeyError):
        advice = suggestion(unknown[0], names, cutoff=NEAR) or "; set it"
        message = f"refers to ${{{unknown[0]}}}, which is not set anywhere{advice}"
        return OwlError("arguments.unknown-reference", f"{where} {message}")
    reason = str(error.msg).partition("\n")[0]
    message = f"holds a reference that cannot be resolved ({reason}); write ${{KEY}} or ${{oc.env:VARIABLE}}"
    return OwlError("arguments.bad-reference", f"{where} {message}")
