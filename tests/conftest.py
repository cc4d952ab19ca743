"""Settings of the whole suite: seeded, quiet, without deadlines (timings are never asserted)."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("owl", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("owl")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give every test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
