"""How the tests of this folder say what in owl/ depends on another library's private names."""

from collections.abc import Callable
from functools import wraps
from typing import Any

CONTRACTED: dict[str, str] = {}
"""Each private name that owl/ uses, with what depends on it."""


def contract(*names: str, needed_by: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a test that checks what owl/ relies on of private names; where it fails, it says what depends on them.

    Args:
        names: Attributes and modules that start with an underscore, and others that are not documented.
        needed_by: The file in owl/ and what it does with them.
    """
    CONTRACTED.update(dict.fromkeys(names, needed_by))

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def checked(*arguments: Any, **named: Any) -> None:
            try:
                test(*arguments, **named)
            except Exception as error:
                raise AssertionError(
                    f"{', '.join(names)}: not what this version of owl relies on any more ({type(error).__name__}: "
                    f"{error}). Needed by {needed_by}. Adapt that, or pin the former release in pyproject.toml"
                ) from error

        return checked

    return mark
