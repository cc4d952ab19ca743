"""A folder with an experiment, and a mistaken command in it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from owl.__main__ import main
from tests.helpers.tiny import tiny_experiment, write_config

ErrorLine = Callable[..., str]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with base.yaml; its dataset is never opened."""
    write_config(tmp_path / "base.yaml", tiny_experiment(Path("data")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def error_line(lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> ErrorLine:
    """Run a mistaken ``fit`` as users do; it must end with status 2 and one line, which is returned."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["owl", "fit", *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as exit_:
            main()
        lines = capsys.readouterr().err.strip().splitlines()
        assert exit_.value.code == 2
        assert len(lines) == 1, lines
        assert not (lab / "runs").exists()
        return lines[0]

    return run
