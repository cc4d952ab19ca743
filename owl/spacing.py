"""Evenly spaced samples."""

import numpy as np


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return indices from 0 to ``count - 1``, at most ``most`` of them, with equal distances up to rounding.

    The first and the last index are among them, only the first if ``most`` is 1.

    Args:
        count: Number of candidates; for 0 the list is empty.
        most: Largest number of indices.
    """
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()
