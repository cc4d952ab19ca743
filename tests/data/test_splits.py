"""Splits: nothing lost, nothing twice, nothing empty, about the shares that were meant."""

import numpy as np
import pytest

from owl.data.splits import split_in_order, split_recordings


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 20, 37, 1000])
def test_in_order_every_episode_is_in_one_split(count: int) -> None:
    names = [f"{n:04d}" for n in range(count)]
    splits = split_in_order(names)
    assert [name for split in ("train", "validation", "test") for name in splits[split]] == names
    assert all(splits.values()) == (count >= 3)
    if count >= 20:
        assert len(splits["validation"]) == len(splits["test"]) == round(0.05 * count)


@pytest.mark.parametrize("seed", range(20))
def test_recordings_are_split_whole_with_about_five_per_cent_each_for_validation_and_test(seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames = {f"video {n}": int(length) for n, length in enumerate(rng.integers(100, 2000, 200))}
    splits = split_recordings(frames)
    assert sorted(name for names in splits.values() for name in names) == sorted(frames)
    for split in ("validation", "test"):
        assert 0.04 < sum(frames[name] for name in splits[split]) / sum(frames.values()) < 0.08
        assert splits[split] == [name for name in frames if name in splits[split]]


@pytest.mark.parametrize(
    "lengths", [[1, 1, 1], [1, 100, 100], [100_000, 1000, 1000], [5, 5, 5, 5], [1000, 1, 1, 1, 1000]]
)
def test_no_split_is_empty_and_the_longest_recording_is_for_training(lengths: list[int]) -> None:
    frames = {f"video {n}": length for n, length in enumerate(lengths)}
    splits = split_recordings(frames)
    assert all(splits.values())
    assert max(frames[name] for name in splits["train"]) == max(lengths)
    assert sorted(name for names in splits.values() for name in names) == sorted(frames)
