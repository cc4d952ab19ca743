"""Commands in processes that have imported what they need, which saves the seconds that a new Python's imports take."""

import os
import sys
from pathlib import Path
from typing import Any

from owl.__main__ import main
from tests.helpers.ranks import RANKS


class Forked:
    """`owl.process.start` for ``python -m owl``; lives and dies like the process that it returns.

    Attributes:
        returncode: As that of ``subprocess.Popen``.
    """

    def __init__(self, command: list[str], log: Path, threads: int | None) -> None:
        assert command[:3] == [sys.executable, "-m", "owl"]
        arguments = (command[3:], str(log.absolute()), os.getcwd())
        self._process: Any = RANKS.Process(target=_run, args=arguments)
        self._process.start()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, None while it runs, -n if signal n has ended it."""
        self.returncode = self._process.exitcode
        return self.returncode


def _run(words: list[str], log: str, folder: str) -> None:
    with open(log, "ab", buffering=0) as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.chdir(folder)
    sys.argv = ["owl", *words]
    main()
