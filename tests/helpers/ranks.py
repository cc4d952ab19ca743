"""Two processes of a run, started as a cluster starts them."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.tiny import owl_here

RANKS = multiprocessing.get_context("forkserver")


def start(target: Callable[..., None], arguments: Callable[[int], tuple[Any, ...]]) -> list[Any]:
    """Start ``target(environment, *arguments(rank))`` for both ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for number in range(2):
        environment = {"RANK": number, "LOCAL_RANK": number, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        words = {key: str(value) for key, value in environment.items()}
        processes.append(RANKS.Process(target=target, args=(words, *arguments(number)), daemon=True))
    for process in processes:
        process.start()
    return processes


def command(environment: dict[str, str], arguments: tuple[str, ...], folder: Path) -> None:
    """Run a command as one of the two ranks."""
    os.environ.update(environment)
    sys.exit(owl_here(*arguments, cwd=folder))


def owl_on_two(*arguments: str, cwd: Path) -> None:
    """Run a command on two processes, to which its options must say so."""
    processes = start(command, lambda number: (arguments, cwd))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
