"""Every code of an error stands on the page of errors, with what it means, and no other does."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from owl.errors import OwlError
from tests.helpers.tiny import REPOSITORY

PAGE = REPOSITORY / "docs" / "reference" / "errors.md"


def raised() -> Iterator[tuple[str, str]]:
    """The code of every `OwlError` that owl/ makes, and where."""
    for path in sorted((REPOSITORY / "owl").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == OwlError.__name__:
                code = node.args[0]
                where = f"{path.relative_to(REPOSITORY)}:{node.lineno}"
                assert isinstance(code, ast.Constant), f"{where} makes its code; write it out, so that it can be found"
                yield str(code.value), where


def test_the_page_lists_every_code_and_no_other() -> None:
    places = dict(raised())
    assert len(places) > 100
    listed = re.findall(r"^\| `([\w.-]+)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    codes = [code for code, _ in listed]
    page = Path(PAGE).relative_to(REPOSITORY)
    missing = [f"| `{code}` | (what it means) |   from {where}" for code, where in places.items() if code not in codes]
    assert not missing, f"add to {page}, in the table of their area:\n" + "\n".join(missing)
    gone = sorted(set(codes) - places.keys())
    assert not gone, f"nothing in owl/ raises these any more; remove them from {page}: {gone}"
    assert len(codes) == len(set(codes)), f"{page} lists a code twice"


def test_codes_are_spelled_alike() -> None:
    for code, where in raised():
        assert re.fullmatch(r"[a-z0-9]+\.[a-z]+(-[a-z]+)*", code), f"{where}: {code} is no area.kind in kebab-case"
