"""Errors of data loading workers: a failed worker raises an error with the reason instead of blocking training."""

import os
from multiprocessing import queues
from typing import Any

from owl.errors import OwlError

SAYINGS = ("DataLoader worker", "Too many open files", "received 0 items of ancdata")
ADVICE = {
    "Too many open files": "raise the limit of open files (ulimit -n)",
    "Bus error": "a file of the dataset may have been cut off while it was read, so run data verify",
    "Killed": "the machine may have run out of memory, so use fewer num_workers or a smaller batch_size",
}
"""Advice by a substring of the message of the system or of PyTorch."""


def report_failures() -> None:
    """Make a worker process send an error if it cannot send a batch; call it in the worker.

    By default the thread of a queue only prints the error, and the consumer of the batch blocks forever.
    """
    queues.Queue._on_queue_feeder_error = _hand_over  # type: ignore[attr-defined]


def _hand_over(queue: Any, error: Exception, item: Any) -> None:
    """Send an error in place of the batch that a queue could not send; called by its thread."""
    if isinstance(item, tuple):  # (batch index, ...); otherwise the pipe itself is broken
        queue.put(
            (item[0], OwlError("loader.worker", f"a loader's worker could not send a batch{with_advice(str(error))}"))
        )
    else:
        os._exit(1)


def worker_failure(error: BaseException) -> OwlError | None:
    """Return a clear error for an error of PyTorch about a dead worker process; None for any other error.

    PyTorch's SIGCHLD handler raises it at any point of training; reading a batch that a dead worker left fails with a
    closed socket.
    """
    message = str(error).partition("\n")[0].partition(". ")[0]  # without PyTorch's list of possible causes
    if isinstance(error, RuntimeError) and message.startswith(SAYINGS):
        return OwlError("loader.worker", f"a loader's worker ended unexpectedly{with_advice(message)}")
    if isinstance(error, ConnectionError | EOFError | FileNotFoundError) and "in DataLoader worker" not in message:
        return OwlError("loader.worker", f"a loader's worker ended unexpectedly{with_advice('Killed or crashed')}")
    return None


def with_advice(reason: str) -> str:
    """Return the reason in parentheses, followed by advice."""
    advice = next((advice for part, advice in ADVICE.items() if part in reason), "set num_workers to 0 to see more")
    return f" ({reason.strip().removesuffix('.')}); {advice}, then resume with --ckpt_path last"
