"""A machine without a C++ compiler is reported, and the run continues; machines may share compiled code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from owl.nn.compilation import can_compile
from tests.helpers.tiny import REPOSITORY


def test_a_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler was found, so nothing is compiled"):
        assert not can_compile("cpu")
    assert can_compile("cuda")
    (tmp_path / "g++").touch(mode=0o755)
    assert can_compile("cpu")


def error_of_compiled_code() -> float:
    def normalize(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]).square()

    x = torch.arange(96.0).view(6, 16).sin()
    return (torch.compile(normalize)(x) - normalize(x)).abs().max().item()


def test_machines_with_other_vector_units_share_a_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tag, the second process runs the first one's code, with half of each vector or less computed."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert error_of_compiled_code() < 1e-4
    code = "from tests.nn.test_compilation import error_of_compiled_code; print(error_of_compiled_code())"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
        stdout=subprocess.PIPE,
        check=True,
    )
    assert float(ran.stdout) < 1e-4
