"""The environment names the code as it is, uncommitted changes included."""

import subprocess
from pathlib import Path

import pytest

from owl import environment


def test_the_state_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert environment.repository(tmp_path) is None
    git("init")
    assert environment.repository(tmp_path) is None  # without a commit
    (tmp_path / "file").write_text("one\n")
    git("add", "file")
    git("commit", "-m", "first")
    (tmp_path / "untracked").write_text("no matter\n")
    (tmp_path / "folder").mkdir()
    clean = {"root": str(tmp_path), "commit": git("rev-parse", "HEAD"), "dirty": False, "diff": ""}
    assert environment.repository(tmp_path / "folder") == clean
    (tmp_path / "file").write_text("two\n")
    changed = environment.repository(tmp_path)
    assert changed is not None
    assert changed["dirty"]
    assert "-one\n+two\n" in changed["diff"]
    monkeypatch.chdir(tmp_path)
    assert changed in environment.environment()["git"]  # of the folder in which a command is given
    monkeypatch.setattr(environment, "LARGEST_DIFF", 10)
    assert environment.repository(tmp_path) == clean | {"dirty": True, "diff": None}
