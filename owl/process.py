"""Process settings for threads, memory and progress bars, applied before heavy packages are imported."""

import ctypes
import io
import os
import sys

SPINS = "10000"  # tens of microseconds: about as long as the pause between two small operations
KEEP_BELOW = 32 * 2**20  # bytes; glibc takes no larger value
KEEP_FREE = 2**30  # bytes
LOG_INTERVAL = "10"  # seconds
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


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
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # available in glibc, not in musl
        mallopt(M_MMAP_THRESHOLD, KEEP_BELOW)
        mallopt(M_TRIM_THRESHOLD, KEEP_FREE)
        mallopt(M_TOP_PAD, KEEP_FREE // 4)
