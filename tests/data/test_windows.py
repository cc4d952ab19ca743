"""Windows hold the right frames, come from one read, agree under augmentation, and outlive damaged data."""

import warnings
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from owl.data import codecs
from owl.data.reader import ShardReader
from owl.data.scan import write_index
from owl.data.shards import DatasetInfo, ShardIndex, ShardWriter, shard_name
from owl.data.windows import CorruptSampleWarning, SkippedEpisodeWarning, WindowDataset
from tests.helpers.errors import refused
from tests.helpers.shards import DESCRIPTIONS, make_dataset, make_numbered, overwrite, render

EVERYTHING = ("rgb", "depth", "flow", "audio", "controls")
SIZE = (24, 40)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("windows") / "data", episodes=4, frames=8)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A dataset that the test may damage; train is episodes 0 and 1."""
    return make_dataset(tmp_path / "own", episodes=4, frames=8)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    lengths = [1, 5, 12, 3, 7]
    return make_numbered(tmp_path_factory.mktemp("numbered"), lengths), lengths


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 6), stride=st.integers(1, 3), hop=st.integers(1, 6))
def test_every_frame_of_every_long_enough_episode_is_reachable(
    numbered: tuple[Path, list[int]], length: int, stride: int, hop: int
) -> None:
    root, lengths = numbered
    span = (length - 1) * stride + 1
    assume(span <= max(lengths))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedEpisodeWarning)
        windows = WindowDataset(root, modalities=("controls",), length=length, stride=stride, hop=min(hop, span))
    covered: dict[str, set[int]] = {}
    for number in range(len(windows)):
        where = windows.describe(number)
        first, last = where["frames"]
        assert last - first + 1 == span
        axes = windows[number]["axes"]
        assert axes.shape == (length, 2)
        assert axes[0].tolist() == [first, 1]
        assert axes[:, 1].tolist() == [1] + [stride] * (length - 1)  # axes are summed over the frames a stride skips
        covered.setdefault(where["episode"], set()).update(range(first, last + 1))
    assert covered == {f"e{e}": set(range(n)) for e, n in enumerate(lengths) if n >= span}


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 3), stride=st.integers(1, 3))
def test_every_frame_is_a_frame_of_a_window_at_hop_one(
    numbered: tuple[Path, list[int]], length: int, stride: int
) -> None:
    root, lengths = numbered
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedEpisodeWarning)
        windows = WindowDataset(root, modalities=("controls",), length=length, stride=stride)
    seen: dict[str, set[int]] = {}
    for number in range(len(windows)):
        where = windows.describe(number)
        seen.setdefault(where["episode"], set()).update(range(where["frames"][0], where["frames"][1] + 1, stride))
    for episode, frames in enumerate(lengths):
        if frames >= length * stride:
            assert seen[f"e{episode}"] == set(range(frames))


def test_a_window_as_long_as_its_episode_is_kept(numbered: tuple[Path, list[int]]) -> None:
    with pytest.warns(SkippedEpisodeWarning, match=r"4 short.* 12 frames.* 7"):
        windows = WindowDataset(numbered[0], modalities=("controls",), length=12)
    assert len(windows) == 1
    assert windows.describe(0) == {"episode": "e2", "shard": "shard-000001.tar", "frames": [0, 11]}


def test_shard_windows_partition_all_windows(numbered: tuple[Path, list[int]]) -> None:
    windows = WindowDataset(numbered[0], modalities=("controls",))
    assert windows.shard_windows() == [range(0, 6), range(6, 21), range(21, 28)]
    for shard, numbers in enumerate(windows.shard_windows()):
        assert {windows.describe(number)["shard"] for number in numbers} == {shard_name(shard)}


def test_a_sample_holds_what_was_stored(dataset: Path) -> None:
    windows = WindowDataset(dataset, modalities=EVERYTHING, length=3)
    number = 6 + 2  # episode 1, frames 2 to 4
    sample, arrays = windows[number], {name: frames[2:5] for name, frames in render(1, 8, SIZE).items()}
    assert windows.describe(number) == {"episode": "episode-001", "shard": "shard-000001.tar", "frames": [2, 4]}
    assert {name: (str(x.dtype), list(x.shape)) for name, x in sample.items()} == {
        "window": ("torch.int64", []),
        "rgb": ("torch.uint8", [3, 3, 24, 40]),
        "depth": ("torch.float32", [3, 1, 24, 40]),
        "flow": ("torch.float32", [3, 2, 12, 20]),
        "audio": ("torch.float32", [2, 3 * 1260]),
        "buttons": ("torch.float32", [3, 3]),
        "axes": ("torch.float32", [3, 2]),
    }
    assert int(sample["window"]) == number
    rgb = np.stack(arrays["rgb"]).transpose(0, 3, 1, 2)
    assert np.abs(sample["rgb"].numpy().astype(int) - rgb).mean() < 5
    np.testing.assert_array_equal(sample["depth"][:, 0], np.stack(arrays["depth"]).astype(np.float32) / 255)
    np.testing.assert_array_equal(sample["flow"], np.stack(arrays["flow"]).transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(sample["audio"], np.concatenate(arrays["audio"]).T.astype(np.float32) / 2**15)
    controls = np.stack(arrays["controls"])
    np.testing.assert_array_equal(torch.cat([sample["buttons"], sample["axes"]], 1), controls)


def test_only_what_was_requested_is_decoded_and_in_one_read(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ShardIndex.load(own)
    overwrite(own, index, 0, 3, "depth.png", b"garbage")
    reads: list[tuple[int, int, int]] = []
    read = ShardReader.read
    monkeypatch.setattr(ShardReader, "read", lambda self, *range_: (reads.append(range_), read(self, *range_))[1])
    windows = WindowDataset(own, modalities=("rgb", "controls"), length=3, stride=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample = windows[1]
    assert set(sample) == {"window", "rgb", "buttons", "axes"}
    first, last = int(index.offsets[1].min()), 5
    columns = [index.extensions.tolist().index(extension) for extension in ("rgb.jpg", "controls.npy")]
    assert reads == [(0, first, int((index.offsets[last] + index.sizes[last])[columns].max()))]
    with pytest.warns(CorruptSampleWarning, match=r"episode-000, frame 3.* episode-000/000003.depth.png"):
        WindowDataset(own, modalities=("depth",), length=3, stride=2)[1]
    reads.clear()
    more = WindowDataset(own, modalities=("rgb", "depth", "controls"), length=3, stride=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part = more.batch([1], ["rgb", "controls"])
    assert len(reads) == 1
    assert all(torch.equal(part[name][0], sample[name]) for name in sample)
    assert set(part) == set(sample)


def test_a_stride_takes_every_nth_frame(dataset: Path) -> None:
    dense = WindowDataset(dataset, modalities=EVERYTHING, length=7)[0]
    strided = WindowDataset(dataset, modalities=EVERYTHING, length=3, stride=3)[0]
    for name in ("rgb", "depth"):
        assert torch.equal(strided[name], dense[name][::3])
    assert torch.equal(strided["flow"][1:], 3 * dense["flow"][3::3])  # the motion is the same everywhere
    assert torch.equal(strided["audio"], dense["audio"])  # sound is not cut into pieces
    assert torch.equal(strided["axes"][1], dense["axes"][1:4].sum(0))
    assert torch.equal(strided["buttons"][2], dense["buttons"][4:7].amax(0))  # pressed at 5, between 3 and 6
    assert strided["buttons"][2, 0] == 1


def test_smaller_pictures_share_one_grid_and_scale_the_flow(dataset: Path) -> None:
    full = WindowDataset(dataset, modalities=("rgb", "depth", "flow"), length=2)[1]
    small = WindowDataset(dataset, modalities=("rgb", "depth", "flow"), length=2, size=(12, 20))[1]
    assert small["rgb"].shape == (2, 3, 12, 20)
    assert small["flow"].shape == (2, 2, 6, 10)
    pooled = torch.nn.functional.avg_pool2d(full["rgb"].float(), 2)
    assert (small["rgb"] - pooled).abs().mean() < 6
    assert torch.equal(small["depth"], full["depth"][..., 1::2, 1::2])  # no mixed distances
    assert torch.allclose(small["flow"], full["flow"][..., ::2, ::2] / 2)


def test_mirroring_commutes_with_decoding(dataset: Path) -> None:
    plain = WindowDataset(dataset, modalities=EVERYTHING, length=4)[2]
    mirrored = WindowDataset(dataset, modalities=EVERYTHING, length=4, flip=1.0)[2, 123]
    assert torch.equal(mirrored["rgb"], plain["rgb"].flip(-1))
    assert torch.equal(mirrored["depth"], plain["depth"].flip(-1))
    assert torch.equal(mirrored["flow"], plain["flow"].flip(-1) * torch.tensor([-1.0, 1.0])[:, None, None])
    assert torch.equal(mirrored["audio"], plain["audio"].flip(0))
    assert torch.equal(mirrored["buttons"], plain["buttons"][:, [0, 2, 1]])
    assert torch.equal(mirrored["axes"], plain["axes"] * torch.tensor([-1.0, 1.0]))
    assert plain["axes"][0, 0] != 0


def test_mirrored_flow_still_leads_back_to_the_previous_frame(dataset: Path) -> None:
    sample = WindowDataset(dataset, modalities=("rgb", "flow"), length=2, flip=1.0)[8, 0]
    dx, dy = (int(v) for v in sample["flow"][1, :, 0, 0])
    assert dx != 0
    previous = torch.roll(sample["rgb"][0], (-dy, -dx), (1, 2)).float()
    inside = (slice(None), slice(4, -4), slice(4, -4))
    right = (previous[inside] - sample["rgb"][1].float()[inside]).abs().mean()
    wrong = (torch.roll(sample["rgb"][0], (-dy, dx), (1, 2)).float()[inside] - sample["rgb"][1][inside]).abs().mean()
    assert right < 6 < wrong


def test_a_crop_is_the_same_for_all_frames_and_modalities(dataset: Path) -> None:
    plain = WindowDataset(dataset, modalities=("rgb", "depth", "flow"), length=3)[0]
    cropped = WindowDataset(dataset, modalities=("rgb", "depth", "flow"), length=3, crop=(16, 20))
    places = set()
    for seed in range(30):
        sample = cropped[0, seed]
        found = [
            (top, left)
            for top in range(0, 9, 2)
            for left in range(0, 21, 2)
            if torch.equal(sample["depth"], plain["depth"][..., top : top + 16, left : left + 20])
        ]
        assert len(found) == 1
        top, left = found[0]
        assert torch.equal(sample["rgb"], plain["rgb"][..., top : top + 16, left : left + 20])
        assert sample["flow"].shape == (3, 2, 8, 10)
        places.add(found[0])
    assert {top for top, _ in places} == {0, 2, 4, 6, 8}  # up to both borders
    assert torch.equal(cropped[0]["depth"], plain["depth"][..., 4:20, 10:30])  # without a seed: central


def test_the_augmentation_depends_on_its_seed_alone(dataset: Path) -> None:
    windows = WindowDataset(dataset, modalities=("rgb",), flip=0.5, crop=(16, 20))
    again = WindowDataset(dataset, modalities=("rgb",), flip=0.5, crop=(16, 20))
    assert all(torch.equal(windows[0, seed]["rgb"], again[0, seed]["rgb"]) for seed in range(5))
    assert len({windows[0, seed]["rgb"].numpy().tobytes() for seed in range(20)}) > 10


def test_audio_of_every_window_has_equal_length_where_frames_do_not(tmp_path: Path) -> None:
    rate, fps = 44_100, 60_000 / 1001
    info = DatasetInfo(fps, SIZE, {"audio": DESCRIPTIONS["audio"]}, {"train": ["a"]}, {}, "test")
    info.save(tmp_path)
    bounds = np.round(np.arange(41) * rate / fps).astype(int)
    ramp = np.arange(bounds[-1], dtype=np.int16)
    with ShardWriter(tmp_path, 0) as writer:
        for frame in range(40):
            samples = ramp[bounds[frame] : bounds[frame + 1]]
            writer.write("a", frame, {"audio.npy": codecs.encode_array(np.stack([samples, samples], -1))})
    write_index(tmp_path)
    windows = WindowDataset(tmp_path, modalities=("audio",), length=7)
    audio = [windows[number]["audio"] for number in range(len(windows))]
    assert {tuple(x.shape) for x in audio} == {(2, int(7 * rate / fps))}
    assert all(((x[0] * 2**15).diff() == 1).all() for x in audio)
    assert len({len(ramp[a:b]) for a, b in pairwise(bounds)}) == 2


def test_one_flipped_bit_in_a_jpeg_costs_its_windows_and_names_the_member(own: Path) -> None:
    index = ShardIndex.load(own)
    row = int(index.episode_row[1]) + 5
    position = int(index.offsets[row, 0] + index.sizes[row, 0] // 2)
    shard = own / shard_name(1)
    data = bytearray(shard.read_bytes())
    data[position] ^= 1
    shard.write_bytes(data)
    windows = WindowDataset(own, length=2)
    bad = {7 + 4, 7 + 5}  # of 7 + 7 windows
    with pytest.warns(CorruptSampleWarning) as caught:
        delivered = {number: int(windows[number]["window"]) for number in range(len(windows))}
    assert {number for number, window in delivered.items() if number != window} == bad
    assert not bad & set(delivered.values())
    message = str(caught[0].message)
    assert len(caught) == 1
    for part in (str(own), "episode episode-001", "frame 5", "episode-001/000005.rgb.jpg", "checksum"):
        assert part in message
    again = WindowDataset(own, length=2)  # another worker, which meets the windows in another order
    with pytest.warns(CorruptSampleWarning):
        assert {n: int(again[n]["window"]) for n in reversed(range(len(again)))} == delivered


def test_a_truncated_shard_costs_only_the_windows_that_it_lost(own: Path) -> None:
    index = ShardIndex.load(own)
    shard = own / shard_name(0)
    shard.write_bytes(shard.read_bytes()[: int(index.offsets[6, 0]) + 5])
    windows = WindowDataset(own, length=2)
    with pytest.warns(CorruptSampleWarning, match="frame 6"):
        delivered = [int(windows[number]["window"]) for number in range(len(windows))]
    assert [n for n, window in enumerate(delivered) if n != window] == [5, 6]


def test_when_everything_is_corrupt_it_ends_with_an_error(own: Path) -> None:
    for number in range(2):
        shard = own / shard_name(number)
        shard.write_bytes(bytes(shard.stat().st_size))
    windows = WindowDataset(own, length=2)
    with pytest.warns(CorruptSampleWarning), refused("windows.damaged", f"14 consecutive windows of {own}"):
        windows[3]


def test_a_missing_shard_is_an_error_not_a_corrupt_sample(own: Path) -> None:
    (own / shard_name(1)).unlink()
    with refused("shard.member", str(own), "shard-000001.tar", "--repair"):
        WindowDataset(own)[8]


def test_episodes_whose_modalities_differ_in_frames_are_skipped_for_those(tmp_path: Path) -> None:
    info = DatasetInfo(
        35.0, SIZE, {m: DESCRIPTIONS[m] for m in ("rgb", "depth")}, {"train": ["a", "b", "gone"]}, {}, "test"
    )
    info.save(tmp_path)
    arrays = render(0, 5, SIZE)
    with ShardWriter(tmp_path, 0) as writer:
        for episode in ("a", "b"):
            for frame in range(5):
                members = {"rgb.jpg": codecs.encode_rgb(arrays["rgb"][frame])}
                if (episode, frame) != ("a", 4):
                    members["depth.png"] = codecs.encode_depth(arrays["depth"][frame])
                writer.write(episode, frame, members)
    write_index(tmp_path)
    with pytest.warns(SkippedEpisodeWarning) as caught:
        assert len(WindowDataset(tmp_path, modalities=("rgb", "depth"), length=2)) == 4
    messages = [str(warning.message) for warning in caught]
    assert any("episode a is skipped" in m and "rgb 5, depth 4 of 5" in m for m in messages)
    assert any("episode gone is skipped: it is in no shard" in m for m in messages)
    with pytest.warns(SkippedEpisodeWarning, match="gone"):
        assert len(WindowDataset(tmp_path, modalities=("rgb",), length=2)) == 8


@pytest.mark.parametrize(
    ("arguments", "code", "tokens"),
    [
        ({"modalities": ("rgb", "sound")}, "windows.modalities", ["'sound'", "rgb, depth, flow, audio, controls"]),
        ({"modalities": ()}, "windows.modalities", ["rgb, depth, flow, audio, controls"]),
        ({"split": "holdout"}, "windows.split", ["'holdout'", "train, validation, test"]),
        ({"length": 9}, "windows.too-short", ["'train'", "9 frames", "8"]),
        ({"length": 3, "stride": 4}, "windows.too-short", ["'train'", "9 frames", "8"]),
        ({"length": 0}, "arguments.too-small", ["length 0", "at least 1"]),
        ({"crop": (25, 40)}, "windows.crop", ["[25, 40]", "[24, 40]"]),
        ({"crop": (15, 20), "modalities": ("rgb", "flow")}, "windows.crop", ["[15, 20]", "1/2", "multiples of 2"]),
    ],
)
def test_requests_that_cannot_be_met_are_explained(
    dataset: Path, arguments: dict, code: str, tokens: list[str]
) -> None:
    with refused(code, *tokens):
        WindowDataset(dataset, **arguments)


def test_an_empty_split_says_what_the_others_hold(own: Path) -> None:
    info = DatasetInfo.load(own)
    info.splits["validation"] = []
    info.save(own)
    with refused("dataset.empty-split", "'validation'", str(own), "train 2, validation 0, test 1"):
        WindowDataset(own, "validation")


def test_controls_without_a_mirror_table_cannot_be_flipped(own: Path) -> None:
    info = DatasetInfo.load(own)
    table = info.modalities["controls"].pop("mirror")
    info.save(own)
    with refused("controls.mirror", str(own), "dataset.json or set flip to 0"):
        WindowDataset(own, modalities=("controls",), flip=0.5)
    WindowDataset(own, modalities=("rgb",), flip=0.5)
    info.modalities["controls"]["mirror"] = {**table, "axes": ["wheel"]}
    info.save(own)
    with refused("controls.mirror", str(own), "wheel"):
        WindowDataset(own, modalities=("controls",), flip=0.5)


def test_a_window_beyond_the_end_is_an_index_error(dataset: Path) -> None:
    windows = WindowDataset(dataset)
    assert len(list(windows)) == len(windows) == 16  # iteration ends
    with pytest.raises(IndexError):
        windows[-1]


def test_memory_urls_read_and_cache(dataset: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{dataset}/*", "/test-windows/data/")
    expected = WindowDataset(dataset, modalities=EVERYTHING, length=2)[9]
    direct = WindowDataset("memory://test-windows/data", modalities=EVERYTHING, length=2)[9]
    cached = WindowDataset("memory://test-windows/data", modalities=EVERYTHING, length=2, cache_dir=tmp_path / "cache")
    assert all(torch.equal(direct[name], expected[name]) for name in expected)
    assert all(torch.equal(cached[9][name], expected[name]) for name in expected)
    copies = sorted(path.name for path in (tmp_path / "cache" / cached.identity).glob("shard-*"))
    assert copies == ["shard-000001.tar", "shard-000001.tar.lock"]  # only what was read, whole
    memory.rm("/test-windows/data/shard-000001.tar")
    assert torch.equal(cached[9]["rgb"], expected["rgb"])  # from the copy
    with refused("shard.member", "memory://test-windows/data", "shard-000001.tar"):
        WindowDataset("memory://test-windows/data", length=2)[9]


def test_a_truncated_remote_shard_costs_only_its_windows(dataset: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{dataset}/*", "/test-truncated/data/")
    shard = "/test-truncated/data/shard-000000.tar"
    memory.pipe_file(shard, memory.cat_file(shard)[:30_000])
    windows = WindowDataset("memory://test-truncated/data", length=1)
    with pytest.warns(CorruptSampleWarning, match="cut short"):
        assert int(windows[7]["window"]) != 7
    assert int(windows[0]["window"]) == 0
