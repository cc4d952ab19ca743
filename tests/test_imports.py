"""The order of packages: a package imports only packages below it."""

from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]


def test_rooms_import_only_the_rooms_below_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order stands in pyproject.toml under ``tool.importlinter`` and in docs/architecture.md."""
    monkeypatch.chdir(ROOT)
    assert lint_imports(cache_dir=None) == 0
