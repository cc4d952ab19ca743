"""What the commands that write datasets print."""

import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from owl.data.shards import ShardIndex


@contextmanager
def printed_warnings() -> Iterator[None]:
    """Print every warning as a line on standard error, above the progress bar."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)
        yield


def print_dataset(directory: str, more: str, was_complete: bool = False) -> None:
    """Print the number of frames of a finished dataset, and how to inspect it.

    Args:
        directory: The dataset.
        more: Text after the number of frames.
        was_complete: Whether it was complete before the command ran.
    """
    complete = "is complete already and was left as it is: it " if was_complete else ""
    print(f"{directory} {complete}holds {ShardIndex.load(directory).frames:,} frames{more}")
    print_inspect(directory)


def print_inspect(directory: str) -> None:
    """Print the command that inspects a dataset."""
    print(f"look at it: python -m owl data inspect {shlex.quote(directory)}")
