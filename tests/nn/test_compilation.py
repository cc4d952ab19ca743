"""A machine without a C++ compiler is reported, and the run continues."""

import pytest

from owl.nn.compilation import can_compile


def test_a_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler was found, so nothing is compiled"):
        assert not can_compile("cpu")
    assert can_compile("cuda")
    (tmp_path / "g++").touch(mode=0o755)
    assert can_compile("cpu")
