"""Storage of datasets: fsspec file systems, local copies of remote files, and locks between processes."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import fsspec
import psutil
from fsspec.implementations.local import LocalFileSystem

from owl.atomic import PARTIAL_SUFFIX
from owl.errors import OwlError

NETWORKS = ("nfs", "cifs", "smb", "lustre", "beegfs", "gpfs", "ceph", "fuse.")
"""Prefixes of types of network file systems, whose locks may not work between machines."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


def open_filesystem(url: str | Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """Split a folder's URL into its fsspec file system and the path inside it.

    Raises:
        OwlError: The protocol is unknown or its package is not installed.
    """
    if "://" not in str(url):  # colons are legal in a path, fsspec takes "a::b" and "data:x" for URLs
        return LocalFileSystem(), os.path.join(os.getcwd(), os.path.expanduser(url)).rstrip("/")
    try:
        filesystem, path = fsspec.core.url_to_fs(str(url))
    except (ImportError, ValueError) as error:
        raise OwlError(
            "storage.protocol", f"{url} cannot be opened ({error}); install the protocol's package or use a local path"
        ) from error
    return filesystem, path.rstrip("/")


def network_of(folder: Path) -> str | None:
    """Return the type of the network file system of a folder, which need not exist; None for a local file system."""
    kinds = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    kind = next((kinds[path] for path in (folder.resolve(), *folder.resolve().parents) if path in kinds), "")
    return kind if kind.startswith(NETWORKS) else None


@contextmanager
def answering(url: str | Path) -> Iterator[None]:
    """Convert errors of a storage to an OwlError; FileNotFoundError is passed through.

    Raises:
        OwlError: Any other error inside the block.
    """
    try:
        yield
    except (OwlError, FileNotFoundError, NotADirectoryError):
        raise
    except Exception as error:  # the packages of the protocols raise their own types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OwlError(
            "storage.unreadable", f"{url} could not be read ({reason}); check the connection and your permissions"
        ) from error


def lock(file: IO, kind: int, folder: str | Path) -> None:
    """Lock an open file between processes (`fcntl.flock`); the lock is released when the process exits.

    Args:
        file: The open file.
        kind: Operation of `fcntl.flock`.
        folder: The protected folder, for the message.

    Raises:
        BlockingIOError: Another process holds the lock and ``kind`` has LOCK_NB.
        OwlError: The file system has no locks.
    """
    try:
        fcntl.flock(file, kind)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise OwlError(
            "storage.no-locks",
            f"the file system of {folder} has no file locks (flock: {error.strerror}), which keep two processes from "
            "writing it at once; use a folder on a local disk and copy it afterwards, or mount the file system with "
            "locks",
        ) from error


def fetch_once(local: Path, fetch: Callable[[str], object]) -> Path:
    """Return a local copy of a remote file, downloaded by the first process of the machine that needs it.

    fsspec's simplecache and filecache write in place, so a second process would read an incomplete file.

    Args:
        local: Path of the copy.
        fetch: Downloads the file to a given path.

    Raises:
        OwlError: The file system of the copy has no locks.
    """
    if local.exists():
        return local
    local.parent.mkdir(parents=True, exist_ok=True)
    with open(local.with_name(f"{local.name}.lock"), "wb") as file:
        lock(file, fcntl.LOCK_EX, local.parent)
        if not local.exists():
            partial = local.with_name(local.name + PARTIAL_SUFFIX)
            try:
                fetch(str(partial))
                os.replace(partial, local)
            finally:
                partial.unlink(missing_ok=True)
    return local
