"""Settings of the whole suite: seeded, quiet, without deadlines (timings are never asserted)."""

import os

# One thread for each test process and for every process it starts: sums then come out bit for bit the same whatever
# ran before, and two test processes do not fight for two cores. Before torch is imported, which reads it then.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("owl", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("owl")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give every test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
