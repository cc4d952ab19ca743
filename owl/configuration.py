"""Configuration files: checks before parsing, changes, and writing that every YAML loader reads in the same way."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from owl.errors import OwlError

PLAIN = re.compile(r"[A-Za-z_/][\w./:-]*", re.ASCII)
"""Strings that are written without quotes, unless YAML 1.1 reads them as another type."""
NUMBERS = ("inf", "infinity", "nan")
"""Words that some loaders read as numbers."""


class _Dumper(yaml.SafeDumper):
    """Quote strings that one of the loaders reads as a number, a date or a boolean.

    YAML 1.1 (PyYAML), jsonargparse and OmegaConf have different rules: ``1e-3`` is a string for the first and a number
    for the others.
    """


def _represent(dumper: yaml.SafeDumper, text: str) -> ScalarNode:
    text = str.__str__(text)  # of subclasses of str, such as defaults of Lightning's callbacks
    style = "'" if text.isprintable() else '"'  # with double quotes, line breaks are written as escapes
    if PLAIN.fullmatch(text) and text.lower() not in NUMBERS:
        style = ""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent)
_Dumper.add_multi_representer(str, _represent)


def dump(content: Any) -> str:
    """Write plain containers, strings, numbers, booleans and None as YAML that is read back as the same values."""
    return yaml.dump(content, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


def without_callback(configuration: dict[str, Any], class_path: str) -> dict[str, Any]:
    """Return a run's configuration without a callback of its trainer."""
    trainer = configuration.get("trainer") or {}
    kept = [callback for callback in trainer.get("callbacks") or [] if callback.get("class_path") != class_path]
    return {**configuration, "trainer": {**trainer, "callbacks": kept or None}}


def check_file(file: str, sections: Collection[str] = ()) -> None:
    """Check that a file contains settings without duplicate keys; a missing file is left to the parser.

    Args:
        file: Path of the file.
        sections: Top-level keys that contain keys, or name a file or a class. The parser would accept any other value
            of such a key and discard the values of earlier files.

    Raises:
        OwlError: The file is not YAML, is empty, is no mapping, has a duplicate key, or a section has an invalid value.
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
        raise OwlError("arguments.empty-file", f"{file} contains no settings, it is empty or all comments; omit it")
    if not isinstance(root, MappingNode):
        raise OwlError(
            "arguments.no-mapping", f"{file} holds {_found(root)}, expected keys with values, such as 'name: first'"
        )
    if all(node.tag.endswith(":null") for _, node in root.value):
        keys = ", ".join(str(key.value) for key, _ in root.value)
        raise OwlError(
            "arguments.empty-file", f"{file} sets no value for {keys or 'any key'}; add one, or omit the file"
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
    """Describe the node found instead of a mapping."""
    if isinstance(node, SequenceNode):
        return "a list"
    return f"only {node.value!r}" if node.value else "no value"


def _refuse_duplicates(file: str, node: Node) -> None:
    """Check a node and all nodes below it for duplicate keys."""
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
                    f"{file} has the key '{name}' twice, in lines {lines[name]} and {line}, and only the last one "
                    "would be used; merge them",
                )
            lines[name] = line
            _refuse_duplicates(file, value)


def _reason(error: yaml.YAMLError) -> str:
    """Describe PyYAML's error and its position."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    problem = str(error.problem)
    if "'\\t'" in problem:
        problem = "indented with a tab, YAML only allows spaces"
    return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {problem}"
