"""One number decides what a run draws: its seed, from which all others are derived."""

import os

import numpy as np


def run_seed() -> int:
    """``seed_everything`` of the run that goes on in this process; 0 outside of one."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def derived_seed(*numbers: int) -> int:
    """A seed in [0, 2^63) for torch, as good as random, that is a function of numbers that are not negative."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
