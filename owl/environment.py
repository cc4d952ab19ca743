"""Environment of a run, stored in every run folder to explain differences between repetitions."""

import os
import platform
import shlex
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from owl.version import code_version

LARGEST_DIFF = 100_000  # bytes; larger ones are not stored


def environment() -> dict[str, Any]:
    """Describe this process.

    Returns:
        ``owl`` (its version with the commit), ``python``, ``platform``, ``devices`` (see `devices`), ``command``,
        ``folder`` (current folder), ``git`` (see `repository`: OWL's checkout and the folder's), ``packages`` (versions
        of all installed packages, by name).
    """
    owl = Path(__file__).resolve().parent.parent
    places = ([owl] if (owl / ".git").exists() else []) + [Path.cwd()]
    found = {state["root"]: state for place in places if (state := repository(place)) is not None}
    return {
        "owl": code_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": devices(),
        "command": shlex.join(["python", "-m", "owl", *sys.argv[1:]]),
        "folder": str(Path.cwd()),
        "git": list(found.values()),
        "packages": packages(),
    }


@cache
def packages() -> dict[str, str]:
    """Return the versions of all installed packages by name, which do not change while a process runs."""
    described = (distribution.metadata for distribution in metadata.distributions())  # parses a file at each access
    return dict(sorted((about["Name"], about["Version"]) for about in described))


def devices() -> dict[str, Any]:
    """Return the processor's name, its cores and torch's threads; the GPUs and their driver and library versions."""
    described: dict[str, Any] = {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
    }
    if described["gpus"]:
        described |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return described


def repository(folder: Path) -> dict[str, Any] | None:
    """Return the state of the git repository that contains a folder; None without a repository or without git.

    Returns:
        ``root``, ``commit``, ``dirty`` (whether tracked files are changed) and ``diff`` (of these files, None if it is
        larger than `LARGEST_DIFF` bytes).
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, check=True).stdout.decode(errors="replace")

    try:
        root, commit = git("rev-parse", "--show-toplevel").strip(), git("rev-parse", "HEAD").strip()
        diff = git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {
        "root": root,
        "commit": commit,
        "dirty": bool(diff),
        "diff": diff if len(diff.encode()) <= LARGEST_DIFF else None,
    }


def _processor() -> str:
    """Return the processor's name, or the machine type if the name is not available."""
    try:
        names = [
            line
            for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
            if line.startswith("model name")
        ]
    except OSError:
        names = []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
