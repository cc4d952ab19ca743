"""Configuration files: what is told of one before it is parsed, and how one is written so that every loader agrees."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from owl.errors import OwlError

PLAIN = re.compile(r"[A-Za-z_/][\w./:-]*", re.ASCII)
"""Strings that are written without quotation marks, unless YAML 1.1 reads them as something else."""
NUMBERS = ("inf", "infinity", "nan")
"""Words that are numbers to some loaders."""


class _Dumper(yaml.SafeDumper):
    """Quotes whatever one of the loaders takes for a number, a date or a truth value.

    YAML 1.1 (PyYAML), jsonargparse and OmegaConf each have rules of their own: ``1e-3`` is a string to the first and a
    number to the others.
    """


def _represent(dumper: yaml.SafeDumper, text: str) -> ScalarNode:
    text = str.__str__(text)  # of strings of a kind of their own, such as defaults of Lightning's callbacks
    style = "'" if text.isprintable() else '"'  # where line breaks and the like are written as escapes
    if PLAIN.fullmatch(text) and text.lower() not in NUMBERS:
        style = ""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent)
_Dumper.add_multi_representer(str, _represent)


def dump(content: Any) -> str:
    """Write plain containers, strings, numbers, truth values and None as YAML that reads back as the same values."""
    return yaml.dump(content, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


def check_file(file: str, sections: Collection[str] = ()) -> None:
    """Check that a file holds settings, and each of them once; one that is not there is left to the parser.

    Args:
        file: Its path.
        sections: Keys at the top that hold keys of their own, or name a file or a class that does. The parser takes
            any other value of such a key, and drops what earlier files gave it.

    Raises:
        OwlError: It is no YAML, empty, no mapping, gives a key twice, or gives a section a value of another kind.
    """
    try:
        root = yaml.compose(Path(file).read_bytes().decode(), yaml.SafeLoader)
    except OSError:
        return
    except UnicodeDecodeError as error:
        raise OwlError(
            "arguments.not-yaml", f"{file} is not valid YAML: byte {error.start} is not UTF-8; save it as UTF-8"
        ) from error
    except yaml.YAMLError as error:
        raise OwlError(
            "arguments.not-yaml", f"{file} is not valid YAML ({_reason(error)}); correct it there"
        ) from error
    if root is None or (isinstance(root, ScalarNode) and root.tag.endswith(":null")):
        raise OwlError("arguments.empty-file", f"{file} holds no settings, it is empty or all comments; leave it out")
    if not isinstance(root, MappingNode):
        raise OwlError(
            "arguments.no-mapping", f"{file} holds {_found(root)}, expected keys with values, such as 'name: first'"
        )
    if all(node.tag.endswith(":null") for _, node in root.value):
        keys = ", ".join(str(key.value) for key, _ in root.value)
        raise OwlError(
            "arguments.empty-file", f"{file} gives no value to {keys or 'any key'}; write one, or leave the file out"
        )
    for key, value in root.value:
        if key.value in sections and not (isinstance(value, MappingNode) or value.tag.endswith(":str")):
            raise OwlError(
                "arguments.no-mapping",
                f"{file}: key '{key.value}' holds {_found(value)}, expected keys with values; write them below it, or "
                "leave it out",
            )
    _refuse_duplicates(file, root)


def _found(node: Node) -> str:
    """What stands where a mapping was expected."""
    if isinstance(node, SequenceNode):
        return "a list"
    return f"only {node.value!r}" if node.value else "no value"


def _refuse_duplicates(file: str, node: Node) -> None:
    """Look through a node and all below it for keys that stand twice in one mapping."""
    if isinstance(node, SequenceNode):
        for value in node.value:
            _refuse_duplicates(file, value)
    elif isinstance(node, MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines and name != "<<":
                raise OwlError(
                    "arguments.duplicate-key",
                    f"{file} gives the key '{name}' twice, in lines {lines[name]} and {line}, and only the last one "
                    "would count; put what they hold under one",
                )
            lines[name] = line
            _refuse_duplicates(file, value)


def _reason(error: yaml.YAMLError) -> str:
    """What PyYAML found, and where."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    problem = str(error.problem)
    if "'\\t'" in problem:
        problem = "a tab indents, where YAML takes spaces alone"
    return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {problem}"
