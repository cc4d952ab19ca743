"""The exception for errors that users can fix, and what its messages share."""

import difflib
from collections.abc import Iterable


class OwlError(Exception):
    """Invalid input, described in one sentence: what was found, what was expected, what to do.

    ``python -m owl`` prints the sentence with its code as a single line and exits with status 2; ``--debug`` shows the
    traceback. The wording of the sentence can change; scripts and tests compare the code.

    Args:
        code: Kind of the error, ``area.kind`` such as "run.exists". Errors with the same remedy share a code.
        message: The sentence.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)  # both, so that the exception survives pickling between processes
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


def at_least(least: int, **counts: float | None) -> None:
    """Check numbers from options; None is an omitted option.

    Raises:
        OwlError: A number is too small.
    """
    for name, count in counts.items():
        if count is not None and not count >= least:  # nor NaN
            raise OwlError("arguments.too-small", f"{name} is {count}, expected at least {least}; give a larger number")


def suggestion(name: object, names: Iterable[str], prefix: str = "", cutoff: float = 0.4) -> str:
    """Return ``; did you mean '...'?`` for the nearest name, or an empty string.

    Args:
        name: The name that does not exist.
        names: Valid names.
        prefix: Added before the nearest name.
        cutoff: Least similarity in [0, 1] (`difflib.get_close_matches`).
    """
    found = difflib.get_close_matches(str(name), list(names), n=1, cutoff=cutoff)
    return f"; did you mean '{prefix}{found[0]}'?" if found else ""
