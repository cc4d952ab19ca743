"""The exception for errors that users can fix."""


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


def at_least(least: int, **counts: int | None) -> None:
    """Check numbers from options; None is an omitted option.

    Raises:
        OwlError: A number is too small.
    """
    for name, count in counts.items():
        if count is not None and count < least:
            raise OwlError("arguments.too-small", f"{name} is {count}, expected at least {least}; give a larger number")
