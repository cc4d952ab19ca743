"""Splits of episodes into train, validation and test."""

import hashlib
from collections.abc import Mapping, Sequence

HELD_OUT = 0.05
"""Share of the validation split and of the test split, each."""


def split_in_order(episodes: Sequence[str]) -> dict[str, list[str]]:
    """Split a list of episodes into 90% train, 5% validation, 5% test, in this order.

    Splits are contiguous, so episodes cut from one recording are adjacent to another split only at two positions.
    With three or more episodes no split is empty; fewer are all used for training.
    """
    held_out = max(1, round(HELD_OUT * len(episodes))) if len(episodes) >= 3 else 0
    train = len(episodes) - 2 * held_out
    return {
        "train": list(episodes[:train]),
        "validation": list(episodes[train : train + held_out]),
        "test": list(episodes[train + held_out :]),
    }


def split_recordings(frames: Mapping[str, int]) -> dict[str, list[str]]:
    """Assign whole recordings to train, validation and test, about 90%, 5% and 5% of the frames.

    The order of assignment is pseudo-random and depends only on the names, so that recordings made at similar times
    are not grouped.

    Args:
        frames: Frames of each of three or more recordings, by name.

    Returns:
        Names by split, each in the order given; no split is empty.
    """
    wanted = HELD_OUT * sum(frames.values())
    left = sorted(frames, key=lambda name: hashlib.sha256(name.encode()).digest())
    splits: dict[str, list[str]] = {}
    for split, others in (("test", 2), ("validation", 1)):  # others: splits that need a recording after this one
        chosen: set[str] = set()
        held = 0
        for name in left:
            if held >= wanted or len(left) - len(chosen) <= others:
                break
            if held + frames[name] <= 1.5 * wanted:
                chosen.add(name)
                held += frames[name]
        if held < wanted / 4:  # every recording is longer than that, or a few frames are all that fits
            chosen = {min(left, key=lambda name: abs(frames[name] - wanted))}
        left = [name for name in left if name not in chosen]
        splits[split] = [name for name in frames if name in chosen]
    remaining = set(left)
    splits["train"] = [name for name in frames if name in remaining]
    return {split: splits[split] for split in ("train", "validation", "test")}
