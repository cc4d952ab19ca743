"""Settings of this process, applied before heavy packages are imported, and processes that end with it."""

import ctypes
import io
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

SPINS = "10000"  # tens of microseconds: about as long as the pause between two small operations
KEEP_BELOW = 32 * 2**20  # bytes; glibc takes no larger value
KEEP_FREE = 2**30  # bytes
LOG_INTERVAL = "10"  # seconds
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_")
"""Prefixes of the environment variables with which launchers set the rank."""


def prepare_process() -> None:
    """Make training on CPUs faster and logs short; call it before torch and tqdm are imported.

    Variables that are set already are respected.

    - Waiting threads sleep, since dataloader workers or other programs share the cores: spinning threads would block
      the ones they wait for. They spin briefly first, since waking a thread takes longer than a small operation.
    - Freed memory is kept for the next step, in large pages, instead of being mapped and zeroed again.
    - Without a terminal, a progress bar is written to the log occasionally instead of ten times a second.
    - Characters that the terminal's encoding lacks, or undecodable bytes in file names, are written as ``\\xe9`` or
      ``\\u20ac``.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", LOG_INTERVAL)
    mallopt = getattr(LIBC, "mallopt", None)
    if mallopt is not None:  # available in glibc, not in musl
        mallopt(M_MMAP_THRESHOLD, KEEP_BELOW)
        mallopt(M_TRIM_THRESHOLD, KEEP_FREE)
        mallopt(M_TOP_PAD, KEEP_FREE // 4)


def start(command: list[str], log: Path, threads: int | None) -> subprocess.Popen[bytes]:
    """Start a command that ends with this process (on Linux, where it receives SIGTERM), whatever ends it.

    It has a session of its own, so that Ctrl-C in the terminal does not reach it, and none of the variables with which
    launchers set the rank.

    Args:
        command: The program and its arguments.
        log: File to which its output is appended.
        threads: Its OpenMP threads; None keeps the default of the libraries.
    """
    variables = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    if threads is not None:
        variables |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with open(log, "ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that `start` has started, with all its child processes."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end_with_parent() -> None:
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
