"""What only a GPU can show: run by ``make test-gpu``, which ends with a table for the documentation."""

import platform
from collections.abc import Callable

import pytest
import torch

Record = Callable[[str, str], None]
"""(check, result): a line of the table."""

ROWS: list[tuple[str, str]] = []


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    """The GPU; without one the run ends, since checks that are skipped look like checks that passed."""
    if not torch.cuda.is_available():
        pytest.exit("no GPU was found, one that torch.cuda sees was expected; run `make test` here", returncode=2)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is compared with CPUs
    return torch.device("cuda")


@pytest.fixture
def record() -> Record:
    """Adds a line to the table."""
    return lambda check, result: ROWS.append((check, result))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print a failure at once: a run on a rented machine may be cut short."""
    if report.failed:
        print(f"\n{report.nodeid}\n{report.longreprtext[-4000:]}", flush=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    if not ROWS:
        return
    terminalreporter.section("for docs/benchmarks.md")
    terminalreporter.write_line(
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"Python {platform.python_version()}\n\n| Check | Result |\n| --- | --- |"
    )
    for check, result in ROWS:
        terminalreporter.write_line(f"| {check} | {result} |")
