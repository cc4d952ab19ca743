"""Shards that others have touched: any folder's name, archives that `tar` packed again, file systems without locks."""

import errno
import fcntl
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from owl.data.overview import DatasetReader
from owl.data.scan import write_index
from owl.data.shards import DatasetInfo, ShardIndex, shard_name, writing
from owl.data.storage import fetch_once
from owl.data.verification import repair_index, verify_members
from owl.data.windows import WindowDataset
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset, pack_again

EVERYTHING = ("rgb", "depth", "flow", "audio", "controls")
NAMES = [
    "game[v2]",
    "a*b?",
    "{x}",
    "12:30:00",
    "s3::b",
    "data:x",
    "file:x",
    "%03d",
    "ta b\nle",
    "naïve 🎮",
    os.fsdecode(b"caf\xe9"),
]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data", episodes=3, frames=12)


def samples(dataset: Path) -> list[dict[str, torch.Tensor]]:
    windows = WindowDataset(dataset, modalities=EVERYTHING, length=3, stride=2)
    return [windows[number] for number in range(len(windows))]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_dataset_may_lie_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, relative: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    root = make_dataset(tmp_path / name, episodes=3, frames=2)
    url = name if relative else str(root)
    (root / "index.npz").unlink()
    assert repair_index(url)
    assert not any(verify_members(DatasetReader(url)))
    assert WindowDataset(url)[0]["rgb"].shape == (1, 3, 24, 40)


def test_other_files_beside_the_shards_are_no_shards(dataset: Path) -> None:
    expected = write_index(dataset)
    for name in ("shard-000000.tar.partial", "shard-copy.tar", "shard-000000.tar.gz", "._shard-000000.tar"):
        (dataset / name).write_bytes(b"x")
    assert write_index(dataset).shards.tolist() == expected.shards.tolist()


@pytest.mark.parametrize(
    ("options", "before"),
    [
        (["--sort=name"], ""),
        (["--sort=name", "--format=pax"], ""),
        (["--sort=name", "--format=gnu"], ""),
        (["--sort=name", "--format=pax", "--pax-option=comment=x,globexthdr.name=g"], ""),
        (
            ["--sort=name"],
            "touch .DS_Store ._x; cd episode-*; touch .DS_Store; for f in 0*; do cp $f ._$f; done",
        ),
    ],
)
def test_shards_that_tar_packed_again_are_indexed_again(dataset: Path, options: list[str], before: str) -> None:
    expected = samples(dataset)
    pack_again(dataset, *options, before=before)
    assert repair_index(str(dataset))
    assert not any(verify_members(DatasetReader(str(dataset))))
    for found, sample in zip(samples(dataset), expected, strict=True):
        assert all(torch.equal(found[name], sample[name]) for name in sample)


def test_long_names_in_headers_of_their_own_are_read(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "data", episodes=3, frames=2)
    long = "e" * 90 + "/" + "f" * 120  # more than USTAR holds
    info = DatasetInfo.load(root)
    info.splits["train"] = [long]
    info.save(root)
    expected = WindowDataset(make_dataset(tmp_path / "same", episodes=3, frames=2), length=2)[0]
    for form in ("pax", "gnu"):
        make_dataset(tmp_path / form, episodes=3, frames=2)
        info.save(tmp_path / form)
        pack_again(tmp_path / form, "--sort=name", f"--format={form}", f"--transform=s,episode-000,{long},")
        write_index(tmp_path / form)
        assert torch.equal(WindowDataset(tmp_path / form, length=2)[0]["rgb"], expected["rgb"])


def shuffle(dataset: Path) -> None:
    """Pack every shard again with its members in random order, folders included."""
    for shard in dataset.glob("shard-*.tar"):
        with tarfile.open(shard) as tar:
            members = [(member, file.read() if (file := tar.extractfile(member)) else b"") for member in tar]
        with tarfile.open(shard, "w") as tar:
            for position in np.random.default_rng(0).permutation(len(members)):
                tar.addfile(members[position][0], io.BytesIO(members[position][1]))


def test_frames_in_any_order_are_read_and_named(dataset: Path) -> None:
    expected = samples(dataset)
    shuffle(dataset)
    with pytest.warns(UserWarning, match="temporal order"):
        assert repair_index(str(dataset))
    for found, sample in zip(samples(dataset), expected, strict=True):
        assert all(torch.equal(found[name], sample[name]) for name in sample)


def test_links_in_a_shard_are_refused_by_name(dataset: Path) -> None:
    before = "cd episode-*; ln -f 000000.rgb.jpg 000001.rgb.jpg"
    pack_again(dataset, "--sort=name", before=before)
    with refused("shard.member", shard_name(0), "000001.rgb.jpg"):
        write_index(dataset)


def test_a_repacked_shard_that_is_cut_short_is_indexed_up_to_there(dataset: Path) -> None:
    pack_again(dataset, "--sort=name")
    index = write_index(dataset)
    shard = dataset / shard_name(1)
    shard.write_bytes(shard.read_bytes()[: int(index.offsets[index.episode_row[1] + 5, 0]) + 3])
    with pytest.warns(UserWarning, match="is damaged"):
        index = write_index(dataset)
    assert index.episode_frames.tolist() == [12, 5, 12]
    assert ShardIndex.load(dataset).episode_frames.tolist() == [12, 5, 12]


def test_a_file_system_without_locks_is_reported_as_such(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with refused("storage.no-locks", str(dataset)), writing(dataset):
        pass
    with refused("storage.no-locks", str(dataset)):
        fetch_once(dataset / "copy", lambda path: None)


def test_a_shard_packed_again_in_another_order_of_the_same_size_is_indexed_again(dataset: Path) -> None:
    expected = samples(dataset)
    pack_again(dataset, "--sort=name")
    write_index(dataset)
    sizes = [shard.stat().st_size for shard in sorted(dataset.glob("shard-*.tar"))]
    assert not repair_index(str(dataset))
    shuffle(dataset)
    assert [shard.stat().st_size for shard in sorted(dataset.glob("shard-*.tar"))] == sizes
    with pytest.warns(UserWarning, match="temporal order"):
        assert repair_index(str(dataset))
    for found, sample in zip(samples(dataset), expected, strict=True):
        assert all(torch.equal(found[name], sample[name]) for name in sample)
