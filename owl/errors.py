"""The one exception that users are meant to read."""


class OwlError(Exception):
    """Bad input, told in one sentence: what was found, what was expected, what to do.

    ``python -m owl`` prints it as a single line and exits with status 2; ``--debug`` shows the traceback.
    """


def at_least(least: int, **counts: int | None) -> None:
    """Check numbers that options gave; None is one that was left out.

    Raises:
        OwlError: One is too small.
    """
    for name, count in counts.items():
        if count is not None and count < least:
            raise OwlError(f"{name} is {count}, at least {least} was expected; give a larger number")
