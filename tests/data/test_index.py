"""The index is a file that processes share: it is mapped, not read, and reopened where a worker needs it."""

import mmap
import pickle
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pytest

from owl.data.npz import map_npz
from owl.data.scan import write_index
from owl.data.shards import DatasetInfo, ShardIndex
from owl.data.windows import WindowDataset
from tests.helpers.errors import refused
from tests.helpers.shards import DESCRIPTIONS, make_dataset

FRAMES, EPISODES = 200_000, 400
BOUND = 2**20  # bytes; the index of this dataset has 20 MB


def make_large(root: Path) -> Path:
    """The description and the index of a dataset whose shards are not there."""
    names = [f"episode-{number:06d}" for number in range(EPISODES)]
    DatasetInfo(30.0, (24, 40), DESCRIPTIONS, {"train": names[:-20], "validation": names[-20:]}, {}, "test").save(root)
    length, members = FRAMES // EPISODES, FRAMES * len(DESCRIPTIONS)
    ShardIndex(
        extensions=np.array([description["extension"] for description in DESCRIPTIONS.values()]),
        episodes=np.array(names),
        episode_shard=np.arange(EPISODES) // 4,
        episode_row=np.arange(EPISODES) * length,
        episode_frames=np.full(EPISODES, length),
        offsets=(np.arange(members) * 1024).reshape(FRAMES, -1),
        sizes=np.full((FRAMES, len(DESCRIPTIONS)), 500),
        checksums=np.zeros((FRAMES, len(DESCRIPTIONS)), np.uint32),
        shards=np.arange(EPISODES // 4),
        shard_bytes=np.full(EPISODES // 4, 10**9),
    ).save(root)
    return root


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_large(tmp_path_factory.mktemp("large"))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data", episodes=3, frames=4)


def mapped(array: np.ndarray) -> bool:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return isinstance(array.base, mmap.mmap)


def test_opening_a_large_dataset_takes_little_memory(large: Path) -> None:
    assert (large / "index.npz").stat().st_size > 15 * BOUND
    tracemalloc.start()
    try:
        windows = WindowDataset(large, modalities=("rgb", "flow", "controls"), length=16, stride=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(windows) == 380 * (500 - 30)
    assert peak < BOUND


def test_workers_get_the_place_of_the_index_not_a_copy(large: Path) -> None:
    index = ShardIndex.load(large)
    assert all(mapped(array) for name, array in vars(index).items() if name != "origin" and array.size)
    content = pickle.dumps(index)
    assert len(content) < 1000
    again = pickle.loads(content)
    assert mapped(again.offsets)
    np.testing.assert_array_equal(again.offsets, index.offsets)
    made = write_index_of(large.parent / "small")  # one that was not read from a file goes as it is
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(made)).offsets, made.offsets)


def write_index_of(root: Path) -> ShardIndex:
    return write_index(make_dataset(root, episodes=3, frames=2))


def test_an_index_that_changed_under_way_is_refused_by_new_workers(dataset: Path) -> None:
    content = pickle.dumps(WindowDataset(dataset))
    assert pickle.loads(content)[0]["rgb"].shape == (1, 3, 24, 40)
    make_dataset(dataset, episodes=3, frames=4, seed=1)
    with refused("index.changed", str(dataset)):
        pickle.loads(content)


def test_one_flipped_bit_in_the_index_is_found(dataset: Path) -> None:
    path = dataset / "index.npz"
    content = bytearray(path.read_bytes())
    content[content.index(b"sizes.npy") + 300] ^= 1
    path.write_bytes(content)
    with refused("index.damaged", str(path), "--repair"):
        ShardIndex.load(dataset)


def test_files_that_numpy_wrote_otherwise_are_reported(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.array(["x", "yz"]), "c": np.asfortranarray(np.eye(3)[:2])}
    np.savez(tmp_path / "plain.npz", **arrays)
    with open(tmp_path / "plain.npz", "rb") as file:
        found, checksums = map_npz(file)
    assert len(set(checksums)) == 3
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0, 0] = 1
    np.savez_compressed(tmp_path / "small.npz", **arrays)
    with open(tmp_path / "small.npz", "rb") as file, pytest.raises(ValueError, match="compressed"):
        map_npz(file)


@pytest.mark.parametrize("cached", [False, True])
def test_the_index_of_a_remote_dataset_is_fetched_and_mapped(dataset: Path, tmp_path: Path, cached: bool) -> None:
    url, cache = f"memory://test-index-{cached}/data", tmp_path / "cache" if cached else None
    memory = fsspec.filesystem("memory")
    for file in dataset.iterdir():
        memory.pipe_file(f"/test-index-{cached}/data/{file.name}", file.read_bytes())
    local, remote = ShardIndex.load(dataset), ShardIndex.load(url, cache)
    assert mapped(remote.offsets)
    np.testing.assert_array_equal(remote.checksums, local.checksums)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(remote)).checksums, local.checksums)
    copies = list(cache.glob("index-*.npz")) if cache else []
    assert len(copies) == int(cached)
    make_dataset(dataset, episodes=3, frames=4, seed=1)  # made again: the old copy is not taken for it
    memory.pipe_file(f"/test-index-{cached}/data/index.npz", (dataset / "index.npz").read_bytes())
    assert not np.array_equal(ShardIndex.load(url, cache).checksums, local.checksums)
