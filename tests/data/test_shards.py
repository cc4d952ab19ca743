"""The format on disk: deterministic bytes, other readers, atomic writes, and every way a dataset can be unfit."""

import json
import re
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset

from owl.data.scan import write_index
from owl.data.shards import DatasetInfo, ShardIndex, ShardWriter, shard_name
from tests.helpers.errors import refused
from tests.helpers.shards import DESCRIPTIONS, encode, make_dataset, render


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data", episodes=3, frames=4)


def test_equal_members_give_equal_bytes(dataset: Path, tmp_path: Path) -> None:
    again = make_dataset(tmp_path / "again", episodes=3, frames=4)
    for number in range(3):
        assert (dataset / shard_name(number)).read_bytes() == (again / shard_name(number)).read_bytes()
    with tarfile.open(dataset / shard_name(0)) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}
    assert (dataset / "index.npz").read_bytes() == (again / "index.npz").read_bytes()


def test_tar_lists_and_extracts_every_member_in_time_order(dataset: Path, tmp_path: Path) -> None:
    shard = dataset / shard_name(1)
    names = subprocess.run(["tar", "tf", shard], check=True, capture_output=True, text=True).stdout.split()
    extensions = [description["extension"] for description in DESCRIPTIONS.values()]
    assert names == [f"episode-001/{frame:06d}.{extension}" for frame in range(4) for extension in extensions]
    subprocess.run(["tar", "xf", shard, "-C", tmp_path], check=True)
    arrays = render(1, 4, (24, 40))
    assert (tmp_path / "episode-001/000002.depth.png").read_bytes() == encode("depth", arrays["depth"][2])
    assert (tmp_path / "episode-001/000003.controls.npy").read_bytes() == encode("controls", arrays["controls"][3])


def test_webdataset_reads_a_frame_as_a_sample(dataset: Path) -> None:
    samples = list(webdataset.WebDataset(str(dataset / shard_name(0)), shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"episode-000/{frame:06d}" for frame in range(4)]
    assert samples[0]["rgb.jpg"].shape == (24, 40, 3)
    np.testing.assert_array_equal(samples[2]["controls.npy"], render(0, 3, (24, 40))["controls"][2])


def test_the_index_points_at_the_members(dataset: Path) -> None:
    index = ShardIndex.load(dataset)
    assert index.episodes.tolist() == ["episode-000", "episode-001", "episode-002"]
    assert index.episode_frames.tolist() == [4, 4, 4]
    row, column = int(index.episode_row[2]) + 3, index.extensions.tolist().index("flow.png")
    shard = (dataset / shard_name(int(index.episode_shard[2]))).read_bytes()
    offset, size = index.offsets[row, column], index.sizes[row, column]
    assert shard[offset : offset + size] == encode("flow", render(2, 4, (24, 40))["flow"][3])
    assert index.shard_bytes[2] == len(shard)


def test_the_examples_of_the_reference_page_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(tmp_path / "data" / "game", frames=9)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "reference" / "shards.md").read_text()
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    local = [(language, code) for language, code in blocks if "s3://" not in code and "--sort" not in code]
    assert len(local) == 5
    names: dict = {}
    for language, code in local:
        if language == "bash":
            subprocess.run(["bash", "-ec", code], check=True, capture_output=True)
        else:
            exec(code, names)
    assert (tmp_path / "episode-000/000008.rgb.jpg").exists()
    assert "episode-000/000008 (24, 40, 3)" in capsys.readouterr().out
    np.testing.assert_array_equal(names["controls"], render(0, 4, (24, 40))["controls"][3])
    assert names["sample"]["rgb"].shape == (8, 3, 24, 40)
    assert names["windows"][0]["document"].tolist() == [0] * 9 + [-1] * 7  # the last example's windows of 16 frames


def test_the_header_is_what_the_reference_page_says(dataset: Path) -> None:
    header = (dataset / shard_name(0)).read_bytes()[:512]
    assert header[:30] == b"episode-000/000000.rgb.jpg" + bytes(4)
    assert header[100:124] == b"0000644\0" + b"0000000\0" * 2
    assert int(header[124:135], 8) == ShardIndex.load(dataset).sizes[0, 0]
    assert header[136:148] == b"00000000000\0"
    assert int(header[148:154], 8) == sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    assert header[156:265] == b"0" + bytes(100) + b"ustar\0" + b"00"
    assert header[265:] == bytes(247)


def test_several_episodes_share_a_shard_and_names_may_hold_dots(tmp_path: Path) -> None:
    _info({"train": ["a.mp4", "b/part.2"]}).save(tmp_path)
    with ShardWriter(tmp_path, 0) as writer:
        for episode in ("a.mp4", "b/part.2"):
            for frame in range(2):
                writer.write(episode, frame, {"rgb.jpg": f"{episode}{frame}".encode()})
    index = write_index(tmp_path)
    assert index.episodes.tolist() == ["a.mp4", "b/part.2"]
    assert index.episode_row.tolist() == [0, 2]
    samples = list(webdataset.WebDataset(str(tmp_path / shard_name(0)), shardshuffle=False))
    assert [sample["rgb.jpg"] for sample in samples] == [b"a.mp40", b"a.mp41", b"b/part.20", b"b/part.21"]


def test_an_error_while_writing_leaves_neither_shard_nor_partial(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path, 0) as writer:  # noqa: PT012
        writer.write("a", 0, {"rgb.jpg": b"1"})
        assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar.partial"]
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("episode", "frame"), [("a", 2), ("a", 0), ("b", 1)])
def test_frames_out_of_order_are_refused(tmp_path: Path, episode: str, frame: int) -> None:
    with pytest.raises(ValueError, match="expected frame"), ShardWriter(tmp_path, 0) as writer:  # noqa: PT012
        writer.write("a", 0, {"rgb.jpg": b"1"})
        writer.write(episode, frame, {"rgb.jpg": b"2"})


def test_a_name_that_ustar_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too long"), ShardWriter(tmp_path, 0) as writer:
        writer.write("e" * 200, 0, {"rgb.jpg": b"1"})


def test_identity_follows_the_samples_not_their_origin(dataset: Path, tmp_path: Path) -> None:
    info, index = DatasetInfo.load(dataset), ShardIndex.load(dataset)
    identity = info.identity(index)
    info.source, info.code_version = {"elsewhere": 1}, "later"
    assert info.identity(index) == identity
    checksums = index.checksums.copy()
    checksums[5, 0] ^= 1  # one other byte in one member
    assert info.identity(replace(index, checksums=checksums)) != identity


def test_a_dataset_in_memory_is_written_and_read(dataset: Path) -> None:
    url = "memory://test-shards/data"
    memory = fsspec.filesystem("memory")
    memory.put(f"{dataset}/shard-*.tar", "/test-shards/data/")
    DatasetInfo.load(dataset).save(url)
    write_index(url)
    assert DatasetInfo.load(url) == DatasetInfo.load(dataset)
    assert DatasetInfo.load(url).identity(ShardIndex.load(url)) == _identity(dataset)


def test_a_shard_cut_short_is_indexed_up_to_its_last_whole_frame(dataset: Path) -> None:
    index = ShardIndex.load(dataset)
    shard = dataset / shard_name(1)
    third = int(index.offsets[index.episode_row[1] + 2, 1])  # within frame 2
    shard.write_bytes(shard.read_bytes()[: third + 10])
    with pytest.warns(UserWarning, match=r"shard-000001.tar is damaged .*episode-001/000002"):
        index = write_index(dataset)
    assert index.episode_frames.tolist() == [4, 2, 4]
    assert (index.sizes > 0).all()


def test_a_hole_or_a_second_copy_of_an_episode_is_refused(dataset: Path) -> None:
    (dataset / shard_name(7)).write_bytes((dataset / shard_name(0)).read_bytes())
    with refused("shard.order", shard_name(7), "frame 0 of episode episode-000", shard_name(0)):
        write_index(dataset)


def test_foreign_tars_are_refused(tmp_path: Path) -> None:
    _info({"train": ["a"]}).save(tmp_path)
    (tmp_path / "notes").write_text("x")
    subprocess.run(["tar", "cf", tmp_path / shard_name(0), "-C", tmp_path, "notes"], check=True)
    with refused("shard.member", shard_name(0), "notes", "<episode>/<frame>.<extension>"):
        write_index(tmp_path)
    (tmp_path / shard_name(0)).unlink()
    with refused("shard.none", str(tmp_path), "shard-*.tar"):
        write_index(tmp_path)


def test_missing_folder_and_missing_description_are_distinguished(tmp_path: Path) -> None:
    with refused("dataset.missing", f"folder {tmp_path / 'nowhere'}"):
        DatasetInfo.load(tmp_path / "nowhere")
    with refused("dataset.missing", f"{tmp_path} holds no dataset.json"):
        DatasetInfo.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "code", "tokens"),
    [
        ({"version": 2}, "dataset.version", ["owl-shards version 2", "owl-shards version 1"]),
        ({"format": "other"}, "dataset.version", ["other version 1", "owl-shards version 1"]),
        ({"fps": None, "frames_per_second": 3}, "dataset.damaged", ["dataset.json", "frames_per_second"]),
        ({"modalities": {"rgb": {}}}, "dataset.damaged", ["dataset.json", "extension"]),
    ],
)
def test_a_description_of_another_kind_is_refused(dataset: Path, change: dict, code: str, tokens: list[str]) -> None:
    content = json.loads((dataset / "dataset.json").read_text()) | change
    (dataset / "dataset.json").write_text(json.dumps(content))
    with refused(code, str(dataset), *tokens):
        DatasetInfo.load(dataset)


def test_a_description_that_is_no_json_is_refused(dataset: Path) -> None:
    (dataset / "dataset.json").write_text("{")
    with refused("dataset.damaged", str(dataset / "dataset.json")):
        DatasetInfo.load(dataset)


def test_a_missing_damaged_or_other_index_says_how_to_rebuild_it(dataset: Path) -> None:
    path = dataset / "index.npz"
    content = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "version": np.int64(9)})
    with refused("index.version", "version 9", "version 1", f"`python -m owl data verify {dataset} --repair`"):
        ShardIndex.load(dataset)
    np.savez(path, **{name: array for name, array in arrays.items() if name != "offsets"})
    with refused("index.damaged", str(path), "offsets", "--repair"):
        ShardIndex.load(dataset)
    path.write_bytes(content[: len(content) // 2])
    with refused("index.damaged", str(path), "--repair"):
        ShardIndex.load(dataset)
    path.unlink()
    with refused("index.missing", str(dataset), "index.npz", "--repair"):
        ShardIndex.load(dataset)


def test_an_unknown_protocol_is_refused() -> None:
    with refused("storage.protocol", "nosuchprotocol://bucket/data"):
        DatasetInfo.load("nosuchprotocol://bucket/data")


def _info(splits: dict[str, list[str]]) -> DatasetInfo:
    return DatasetInfo(35.0, (24, 40), {"rgb": DESCRIPTIONS["rgb"]}, splits, {}, "test")


def _identity(root: Path) -> str:
    return DatasetInfo.load(root).identity(ShardIndex.load(root))
