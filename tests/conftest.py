"""Settings of the whole suite: seeded, quiet, without deadlines (timings are never asserted)."""

import gc
import multiprocessing
import os
import signal
from collections.abc import Generator

# One thread for each test process and for every process it starts: sums then come out bit for bit the same whatever
# ran before, and two test processes do not fight for two cores. Before torch is imported, which reads it then.
os.environ["OMP_NUM_THREADS"] = "1"

gc.disable()  # until all tests are imported: nearly all objects that imports create stay

import pytest
import torch
import torch._dynamo
from hypothesis import settings

from owl.data import jobs

torch.set_num_threads(1)
# As in a terminal: where the suite runs in the background, it and every process that it starts would ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
# What "forkserver" starts has imported these and done nothing: quicker than "spawn", and forks of a test process would
# inherit what its threads were at.
multiprocessing.set_forkserver_preload(
    [
        "owl.cli.lightning",
        "owl.data.datamodule",
        "owl.recipes.image_vae",
        "owl.recipes.world_model",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.utils.tensorboard",
    ]
)
settings.register_profile("owl", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("owl")


LONG = (
    *("test_strategies.py", "test_trust.py", "test_sweep.py", "test_fp8.py", "test_docs.py"),
    *("test_experiments.py", "test_recorder.py"),
)
"""Files that take half a minute or more. They come first: one that started last would keep one core waiting."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the long files."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect garbage again after all tests were imported, but not among what was."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(*gc.get_threshold()[:2], 30)  # full collections three times as rarely
        gc.enable()


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Give every test the same random numbers and nothing compiled, whatever ran before it."""
    torch.manual_seed(0)
    os.environ.pop("PL_GLOBAL_SEED", None)  # Lightning leaves that of the last run behind
    torch._dynamo.reset()  # it compiles a function only so many times, also for networks that are gone


@pytest.fixture
def recorded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record games in this process, which saves the imports of others; tests/data/test_recorder.py has real ones."""
    for module in ("recorder", "played"):
        monkeypatch.setattr(f"owl.data.{module}.run", lambda job, root, workers: jobs.run(job, root))
