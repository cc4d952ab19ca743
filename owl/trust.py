"""Trusted code: the classes that checkpoints and exports may name, which are imported and run."""

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
    """Trust a package: allow files to name its classes, in this process and in those that it starts."""
    os.environ[VARIABLE] = ",".join(filter(None, [os.environ.get(VARIABLE), package]))


def trusted(module: str) -> bool:
    """Return whether a file may name classes of a module: OWL's, an already imported one, or a trusted one."""
    named = [*OURS, *filter(None, os.environ.get(VARIABLE, "").split(","))]
    return module in sys.modules or any(f"{module}.".startswith(f"{package}.") for package in named)


def check(content: Any, file: str | Path) -> None:
    """Check that a file names only trusted code, before any of it is imported.

    Args:
        content: Content of the file: plain values, in which any word can be the path of a class.
        file: Name of the file.

    Raises:
        OwlError: A word is a path into a module that is installed, or in the current folder, and not `trusted`.
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
                f"{file} names {content}, which is neither part of OWL nor already imported; if you trust it, add "
                f"--trust {package} (in Python: import {module} before you load the file)",
            )
