"""Every kind of damage is named, and an index is rebuilt only where it does not fit its shards."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from owl.data.overview import DatasetReader
from owl.data.shards import DatasetInfo, ShardIndex, shard_name
from owl.data.verification import index_is_current, missing_episodes, repair_index, verify_members
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    return str(make_dataset(tmp_path / "data", episodes=3, frames=4))


def problems(dataset: str) -> list[str]:
    return [problem for episode in verify_members(DatasetReader(dataset)) for problem in episode]


def flip(dataset: str, episode: int, frame: int, extension: str) -> None:
    """Flip one bit in the middle of a member."""
    index = ShardIndex.load(dataset)
    row, column = int(index.episode_row[episode]) + frame, index.extensions.tolist().index(extension)
    path = Path(dataset, shard_name(int(index.episode_shard[episode])))
    data = bytearray(path.read_bytes())
    data[int(index.offsets[row, column] + index.sizes[row, column] // 2)] ^= 1
    path.write_bytes(data)


def test_a_sound_dataset_has_no_problems(dataset: str) -> None:
    assert problems(dataset) == []
    assert missing_episodes(DatasetReader(dataset)) == []


@pytest.mark.parametrize("extension", ["rgb.jpg", "depth.png", "flow.png", "audio.npy", "controls.npy"])
def test_one_flipped_bit_is_found_in_every_kind_of_member(dataset: str, extension: str) -> None:
    flip(dataset, 1, 2, extension)
    assert problems(dataset) == [
        f"{dataset}/shard-000001.tar: episode-001/000002.{extension}: its checksum is wrong",
    ]


def test_a_member_that_never_decoded_is_found(dataset: str) -> None:
    flip(dataset, 1, 2, "depth.png")
    Path(dataset, "index.npz").unlink()
    assert repair_index(dataset)  # takes the checksum of what is there
    (problem,) = problems(dataset)
    assert problem.startswith(f"{dataset}/shard-000001.tar: episode-001/000002.depth.png: ")


def test_every_member_behind_a_cut_is_named(dataset: str) -> None:
    index, path = ShardIndex.load(dataset), Path(dataset, shard_name(2))
    path.write_bytes(path.read_bytes()[: int(index.offsets[index.episode_row[2] + 3, 0])])
    assert problems(dataset) == [
        f"{dataset}/shard-000002.tar: episode-002/000003.{extension}: the shard is cut short"
        for extension in index.extensions
    ]


def test_an_absent_member_is_named(dataset: str) -> None:
    index = ShardIndex.load(dataset)
    sizes, offsets = index.sizes.copy(), index.offsets.copy()
    sizes[1, 2] = offsets[1, 2] = -1
    replace(index, sizes=sizes, offsets=offsets).save(dataset)
    assert problems(dataset) == [f"{dataset}/shard-000000.tar: episode-000/000001.flow.png: it is absent"]


def test_an_episode_that_no_shard_holds_is_named(dataset: str) -> None:
    info = DatasetInfo.load(dataset)
    info.splits["test"].append("lost")
    info.save(dataset)
    assert missing_episodes(DatasetReader(dataset)) == [f"{dataset}: episode lost of split test is in no shard"]


def test_a_missing_or_other_index_is_rebuilt_to_the_byte(dataset: str) -> None:
    path = Path(dataset, "index.npz")
    content = path.read_bytes()
    path.unlink()
    assert repair_index(dataset)
    assert path.read_bytes() == content
    np.savez(path, version=np.int64(9))
    assert repair_index(dataset)
    assert path.read_bytes() == content


def test_an_interrupted_dataset_is_not_made_to_look_complete(dataset: str) -> None:
    index, shard = Path(dataset, "index.npz"), Path(dataset, shard_name(1))
    content = shard.read_bytes()
    shard.unlink()
    index.unlink()
    with refused("dataset.unfinished", dataset, "1 of its episodes", "episode-001"):
        repair_index(dataset)
    assert not index.exists()
    shard.write_bytes(content)
    assert repair_index(dataset)
    shard.unlink()  # lost since
    assert repair_index(dataset)


def test_an_index_that_fits_is_kept_so_that_damage_stays_visible(dataset: str) -> None:
    flip(dataset, 0, 0, "rgb.jpg")
    assert index_is_current(dataset)
    assert not repair_index(dataset)
    assert len(problems(dataset)) == 1


def test_a_shard_that_grew_shrank_or_came_makes_the_index_outdated(dataset: str) -> None:
    path = Path(dataset, shard_name(2))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert not index_is_current(dataset)
    with pytest.warns(UserWarning, match="are left out"):
        assert repair_index(dataset)
    assert problems(dataset) == []  # the frames that are left are whole
    path.rename(Path(dataset, shard_name(5)))
    assert not index_is_current(dataset)


def test_without_a_description_nothing_can_be_repaired(dataset: str) -> None:
    Path(dataset, "dataset.json").unlink()
    with refused("dataset.missing", f"{dataset} holds no dataset.json"):
        repair_index(dataset)
