"""Files that are whole or not there, and errors that name them."""

import errno
from pathlib import Path
from typing import BinaryIO

import pytest

from owl.atomic import atomic_write


def test_a_full_disk_keeps_the_old_file_and_names_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    atomic_write(path, "old")

    def fill(file: BinaryIO) -> None:
        file.write(b"half of the n")
        raise OSError(errno.ENOSPC, "No space left on device")  # which does not know the file

    with pytest.raises(OSError, match="No space left") as caught:
        atomic_write(path, fill)
    assert caught.value.filename == str(path)
    assert [file.read_text() for file in path.parent.iterdir()] == ["old"]
