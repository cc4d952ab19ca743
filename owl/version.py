"""Version string of the code, stored in every dataset, checkpoint and report."""

import functools
import subprocess
from importlib import metadata
from pathlib import Path


@functools.cache
def code_version() -> str:
    """Return ``<package version>`` or, in a git checkout, ``<package version>+g<commit>[.dirty]``."""
    try:
        version = metadata.version("owl-platform")
    except metadata.PackageNotFoundError:
        version = "0"
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return version

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "--short", "HEAD").strip()
        dirty = ".dirty" if git("status", "--porcelain", "--untracked-files=no").strip() else ""
    except (OSError, subprocess.CalledProcessError):  # no git program, or a checkout without commits
        return version
    return f"{version}+g{commit}{dirty}"
