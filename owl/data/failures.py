"""What becomes of a training whose loader's workers fail: an error that says why, never a wait for ever."""

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
"""What to do, by a part of what the system or PyTorch says."""


def report_failures() -> None:
    """Make a worker hand over its failure where it cannot hand over a batch; call it in the worker.

    A queue's thread only prints what went wrong, and whoever waits for the batch does so for ever.
    """
    queues.Queue._on_queue_feeder_error = _hand_over  # type: ignore[attr-defined]


def _hand_over(queue: Any, error: Exception, item: Any) -> None:
    """Put an error in the place of the batch that a queue could not send; called by its thread."""
    if isinstance(item, tuple):  # with the number of the batch; otherwise the pipe itself is broken
        queue.put(
            (item[0], OwlError("loader.worker", f"a loader's worker could not hand over a batch{told(str(error))}"))
        )
    else:
        os._exit(1)


def worker_failure(error: BaseException) -> OwlError | None:
    """Return what to tell instead of an error that says, in PyTorch's words, that a worker is gone; None of any other.

    Its SIGCHLD handler raises one wherever training is; who takes a batch that a dead worker left finds its socket
    closed.
    """
    message = str(error).partition("\n")[0].partition(". ")[0]  # not what else PyTorch thinks possible
    if isinstance(error, RuntimeError) and message.startswith(SAYINGS):
        return OwlError("loader.worker", f"a loader's worker ended amid its work{told(message)}")
    if isinstance(error, ConnectionError | EOFError | FileNotFoundError) and "in DataLoader worker" not in message:
        return OwlError("loader.worker", f"a loader's worker ended amid its work{told('Killed or crashed')}")
    return None


def told(reason: str) -> str:
    """The reason in brackets and what to do about it."""
    advice = next((advice for part, advice in ADVICE.items() if part in reason), "set num_workers to 0 to see more")
    return f" ({reason.strip().removesuffix('.')}); {advice}, then go on with --ckpt_path last"
