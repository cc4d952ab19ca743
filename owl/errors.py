"""The one exception that users are meant to read."""


class OwlError(Exception):
    """Bad input, told in one sentence: what was found, what was expected, what to do.

    ``python -m owl`` prints it as a single line and exits with status 2; ``--debug`` shows the traceback.
    """
