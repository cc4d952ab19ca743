"""Whose code a file may make this process import and run: the classes that checkpoints and exports name."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

from owl.errors import OwlError

VARIABLE = "OWL_TRUST"
"""Environment variable with the packages that the user trusts, separated by commas; ``--trust`` adds to it."""

OURS = ("owl", "torch", "lightning")

DOTTED = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+")


def trust(package: str) -> None:
    """Let files name classes of a package, in this process and in those that it starts."""
    os.environ[VARIABLE] = ",".join(filter(None, [os.environ.get(VARIABLE), package]))


def trusted(module: str) -> bool:
    """Whether a file may name classes of a module: OWL's, one that is imported already, or one that the user trusts."""
    named = [*OURS, *filter(None, os.environ.get(VARIABLE, "").split(","))]
    return module in sys.modules or any(f"{module}.".startswith(f"{package}.") for package in named)


def check(content: Any, file: str | Path) -> None:
    """Refuse a file that names code which nobody trusts, before any of it is imported.

    Args:
        content: Of the file: plain values, in which any word may turn out to be the path of a class.
        file: Its name.

    Raises:
        OwlError: A word is the path of something in a module that is installed, or in the current folder, and not
            `trusted`.
    """
    if isinstance(content, dict):
        for value in content.values():
            check(value, file)
    elif isinstance(content, list | tuple):
        for value in content:
            check(value, file)
    elif isinstance(content, str) and DOTTED.fullmatch(content):
        module, package = content.rpartition(".")[0], content.partition(".")[0]
        if not trusted(module) and (package in sys.modules or importlib.util.find_spec(package) is not None):
            raise OwlError(
                "network.untrusted",
                f"{file} names {content}, whose code is neither OWL's nor imported already; if you trust it, add "
                f"--trust {package} (in Python: import {module} before you load the file)",
            )
