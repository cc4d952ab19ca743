"""What a device multiplies fast, and that nothing multiplies bfloat16 where it does not: on any machine."""

import json
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from owl import hardware
from owl.hardware import Rates, fast_dtype, multiplies_bfloat16, trainer_precision
from owl.optim.muon import orthogonalise
from tests.helpers.arithmetic import FAST, SLOW, Dtypes, without_units
from tests.helpers.lab import checkpoint, fit, make_lab
from tests.helpers.ranks import RANKS

X86 = platform.machine() in ("x86_64", "AMD64")
AUTO = ("--trainer.precision", "auto", "--trainer.max_steps")
FLOAT32 = {"float32"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lab(tmp_path_factory.mktemp("hardware"))


def pretend(monkeypatch: pytest.MonkeyPatch, rates: Rates) -> None:
    """Make this machine one whose CPU multiplies at these rates."""
    monkeypatch.setattr(hardware, "cpu_rates", lambda: rates)


def precision(lab: Path, name: str) -> str:
    return yaml.safe_load((lab / "runs" / name / "config.yaml").read_text())["trainer"]["precision"]


def test_rates_are_measured_without_a_trace() -> None:
    torch.set_num_threads(2)
    try:
        hardware.cpu_rates.cache_clear()
        with torch.autocast("cpu", torch.bfloat16):  # which would have both in bfloat16
            rates = hardware.cpu_rates()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert rates is hardware.cpu_rates()
    assert multiplies_bfloat16("cpu") == (rates.bfloat16 > rates.float32)
    assert fast_dtype("meta") == torch.float32  # nothing is known of it


@pytest.mark.parametrize(("cores", "variable", "threads"), [(2, None, 1), (1, None, 1), (16, None, 3), (2, "3", 3)])
def test_a_core_is_left_to_the_browser(
    cores: int, variable: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    torch.set_num_threads(3)
    try:
        hardware.leave_a_core()
        assert torch.get_num_threads() == threads
        with ThreadPoolExecutor(1) as pool:  # a session plays in a thread of its own
            assert pool.submit(torch.get_num_threads).result() == threads
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif(not X86, reason="oneDNN's variable is for x86")
def test_nothing_multiplies_bfloat16_where_the_cpu_has_no_units_for_it(tmp_path: Path) -> None:
    """Training, the optimiser, encoding and rollouts, in a process whose CPU has neither AVX-512 nor bfloat16."""
    process: Any = RANKS.Process(target=without_units, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.pop("fast") is False
    assert "GFLOP/s" in found.pop("cost")
    assert {name: part["precision"] for name, part in found.items()} == {
        "quickstart": "32-true",
        "world_model_quickstart": "32-true",
        "rollout": "fp32",
    }
    for name, part in found.items():
        assert len(part["products"]) >= 2, name
        for operators in (part["products"], part["others"]):
            low = {operator for operator, dtypes in operators.items() if "bfloat16" in dtypes}
            assert not low, name
    assert "convolution_backward" in found["quickstart"]["products"]
    assert {"bmm", "mm"} <= found["world_model_quickstart"]["products"].keys()


def test_the_recorder_of_dtypes_sees_bfloat16() -> None:
    layer = torch.nn.Linear(8, 8)
    with Dtypes() as dtypes, torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(4, 8)).sum().backward()
    assert all("bfloat16" in found for found in dtypes.products.values())
    assert {"addmm", "mm"} <= dtypes.products.keys()


@pytest.mark.parametrize(("rates", "dtype"), [(FAST, "bfloat16"), (SLOW, "float32")])
def test_muon_iterates_in_what_is_fast(rates: Rates, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, rates)
    matrix = torch.randn(8, 16)
    with Dtypes() as dtypes:
        found = orthogonalise(matrix)
    assert found.dtype == matrix.dtype
    assert set().union(*dtypes.products.values()) == {dtype}


@pytest.mark.parametrize(
    ("rates", "expected", "other"), [(FAST, "bf16-mixed", SLOW), (SLOW, "32-true", FAST)], ids=["fast", "slow"]
)
def test_auto_is_resolved_when_a_run_starts_and_kept(
    lab: Path, rates: Rates, expected: str, other: Rates, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pretend(monkeypatch, rates)
    assert fit(lab, expected, *AUTO, "1") == 0
    out = capsys.readouterr().out
    assert f"{expected} on 1 x cpu" in out.splitlines()[0]
    assert "GFLOP/s" not in out
    assert precision(lab, expected) == checkpoint(lab, expected)["owl"]["config"]["trainer"]["precision"] == expected
    pretend(monkeypatch, other)  # the run moves to another machine
    assert fit(lab, expected, *AUTO, "2", "--ckpt_path", "last") == 0
    assert precision(lab, expected) == expected
    explicit = {"bf16-mixed": "32-true", "32-true": "bf16-mixed"}[expected]
    assert fit(lab, expected, "--trainer.precision", explicit, "--trainer.max_steps", "3", "--ckpt_path", "last") == 0
    assert precision(lab, expected) == explicit


def test_requested_bfloat16_runs_anywhere_and_reports_its_cost(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pretend(monkeypatch, SLOW)
    assert fit(lab, "asked", "--trainer.precision", "bf16-mixed", "--trainer.max_steps", "1") == 0
    found = [line for line in capsys.readouterr().out.splitlines() if "GFLOP/s" in line]
    assert len(found) == 1
    assert "bfloat16 products run at 1 GFLOP/s" in found[0]
    assert "float32 at 165" in found[0]
    assert precision(lab, "asked") == "bf16-mixed"


@pytest.mark.parametrize("rates", [FAST, SLOW])
def test_python_users_call_the_same_function(rates: Rates, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, rates)
    trainer = Trainer(accelerator="cpu", precision=trainer_precision("cpu"), logger=False)
    assert trainer.precision == {FAST: "bf16-mixed", SLOW: "32-true"}[rates]
