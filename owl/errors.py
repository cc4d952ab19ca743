"""The one exception that users are meant to read."""


class OwlError(Exception):
    """Bad input, told in one sentence: what was found, what was expected, what to do.

    ``python -m owl`` prints the sentence with its code as a single line and exits with status 2; ``--debug`` shows the
    traceback. The sentence is for people and may be reworded; scripts and tests compare the code.

    Args:
        code: What kind of fault this is, ``area.kind`` such as "run.exists". Faults that are mended alike share one.
        message: The sentence.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)  # both, so that the exception survives pickling between processes
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


def at_least(least: int, **counts: int | None) -> None:
    """Check numbers that options gave; None is one that was left out.

    Raises:
        OwlError: One is too small.
    """
    for name, count in counts.items():
        if count is not None and count < least:
            raise OwlError(
                "arguments.too-small", f"{name} is {count}, at least {least} was expected; give a larger number"
            )
