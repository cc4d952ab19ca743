"""Files are UTF-8 whatever the locale: nothing in owl/ opens one as text without naming the encoding."""

import ast
import re

import pytest

from tests.helpers.tiny import REPOSITORY

TEMPORARY = {"TemporaryFile", "NamedTemporaryFile", "SpooledTemporaryFile"}  # binary by default
TEXT_MODE = re.compile(r"[rwax+t]+")


def in_locale(source: str) -> list[int]:
    """The lines that open a file as text in the encoding of the locale."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and _in_locale(node)]


def _in_locale(call: ast.Call) -> bool:
    method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if name in ("read_text", "write_text"):
        return len(call.args) < (1 if name == "read_text" else 2)
    if name not in ("open", "fdopen", *TEMPORARY):
        return False
    position = 0 if name in TEMPORARY or (method and name == "open") else 1
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] + call.args[position : position + 1]
    if not given:  # the default is text, where the file is not an argument; of others, such as tarfile.open, it is not
        return name not in TEMPORARY and (not method or not call.args)
    return isinstance(given[0], ast.Constant) and bool(TEXT_MODE.fullmatch(str(given[0].value)))


def test_no_file_is_opened_in_the_encoding_of_the_locale() -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}:{line}"
        for path in sorted((REPOSITORY / "owl").rglob("*.py"))
        for line in in_locale(path.read_text("utf-8"))
    ]
    assert not found, f'add encoding="utf-8", or read bytes: {", ".join(found)}'


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, mode='w')", True),
        ("open(path, 'rb')", False),
        ("open(path, 'w', encoding='utf-8')", False),
        ("path.open()", True),
        ("path.open('w')", True),
        ("path.open('rb')", False),
        ("tarfile.open(path)", False),
        ("os.fdopen(number, 'w')", True),
        ("path.read_text()", True),
        ("(folder / name).read_text(errors='replace')", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text(content)", True),
        ("path.write_text(content, 'utf-8')", False),
        ("tempfile.TemporaryFile('w+')", True),
        ("tempfile.NamedTemporaryFile()", False),
    ],
)
def test_what_the_search_finds(source: str, bad: bool) -> None:
    assert bool(in_locale(source)) == bad
