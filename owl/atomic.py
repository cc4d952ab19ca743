"""Write files atomically: after an interruption or on a full disk, either the old or the new file exists."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

PARTIAL_SUFFIX = ".partial"


def atomic_write(path: str | Path, content: bytes | str | Callable[[BinaryIO], None]) -> None:
    """Write a local file through ``<path>.partial`` in the same folder, fsync it, and rename it into place.

    Args:
        path: Destination; its folder is created.
        content: Bytes, text (UTF-8), or a function that writes into the open binary file (for content too
            large to hold in memory twice).

    Raises:
        OSError: The folder is not writable or the disk is full; the previous file is intact and the partial file is
            removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with open(partial, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # on a full disk, write() does not set the file name
            error.filename = str(path)
        raise
