"""Seeds, all derived from the seed of the run."""

import os

import numpy as np


def run_seed() -> int:
    """Return ``seed_everything`` of the current run; 0 outside of a run."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def derived_seed(*numbers: int) -> int:
    """Return a pseudorandom seed in [0, 2^63) for torch, as a function of non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
