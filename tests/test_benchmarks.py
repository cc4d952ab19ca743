"""Benchmarks that use parts of recipes and recorders run to their end; after so little work their figures are noise."""

from importlib import import_module

import pytest

SHORTENED = {
    "precision": (["--here", "--seconds", "0"], "engine, a frame"),
    "trainer": (["--steps", "20", "--rounds", "1"], "between steps"),
    "recorder": (["--frames", "60", "--rounds", "1", "--workers", "1"], "two cores to itself"),
}


@pytest.mark.parametrize("script", SHORTENED)
def test_a_benchmark_reaches_its_last_line(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, last = SHORTENED[script]
    monkeypatch.setattr("sys.argv", [script, *options])
    import_module(f"benchmarks.{script}").main()
    assert last in capsys.readouterr().out.splitlines()[-1]
