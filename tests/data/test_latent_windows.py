"""Windows of latents, and windows that short episodes share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from owl.data import codecs
from owl.data.scan import write_index
from owl.data.shards import DatasetInfo, ShardIndex, ShardWriter
from owl.data.windows import CorruptSampleWarning, SkippedEpisodeWarning, WindowDataset
from tests.helpers.errors import refused
from tests.helpers.shards import DESCRIPTIONS, make_dataset, make_numbered, overwrite


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight frames of two kinds of latents and controls; every latent is filled with its frame's number."""
    root = tmp_path_factory.mktemp("latents")
    modalities = {
        "latent": {"extension": "latent.npy", "encoding": "npy float16[c, h, w]", "shape": [4, 3, 5]},
        "audio_latent": {"extension": "audio_latent.npy", "encoding": "npy float16[k, c]", "shape": [2, 6]},
        "controls": DESCRIPTIONS["controls"],
    }
    DatasetInfo(30.0, (24, 40), modalities, {"train": ["a"]}, {}, "test").save(root)
    with ShardWriter(root, 0) as writer:
        for frame in range(8):
            arrays = {
                "latent.npy": np.full((4, 3, 5), frame, np.float16),
                "audio_latent.npy": np.full((2, 6), -frame, np.float16),
                "controls.npy": np.full(5, 1, np.float32),
            }
            writer.write("a", frame, {name: codecs.encode_array(array) for name, array in arrays.items()})
    write_index(root)
    return root


def test_latents_follow_the_stride_and_keep_their_size(latents: Path) -> None:
    windows = WindowDataset(
        latents, modalities=("latent", "audio_latent", "controls"), length=3, stride=2, size=(12, 20)
    )
    for batch in (windows.batch([1]), {name: tensor[None] for name, tensor in windows[1].items()}):
        assert batch["latent"].dtype == batch["audio_latent"].dtype == torch.float32
        assert torch.equal(batch["latent"], torch.tensor([1.0, 3, 5]).view(1, 3, 1, 1, 1).expand(1, 3, 4, 3, 5))
        heard = -torch.tensor([[0.0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5]])  # all since the previous frame
        assert torch.equal(batch["audio_latent"], heard.view(1, 3, 4, 1).expand(1, 3, 4, 6))
        assert batch["axes"][0, 1:].unique().item() == 2  # controls are summed over what the stride skips


def test_sound_before_an_episode_is_its_first_token_repeated(latents: Path) -> None:
    windows = WindowDataset(latents, modalities=("audio_latent",), length=2, stride=3)
    found = [windows[number]["audio_latent"][..., 0].tolist() for number in range(3)]
    assert found[0] == [[0] * 6, [-1, -1, -2, -2, -3, -3]]
    assert found[1] == [[0] * 4 + [-1] * 2, [-2, -2, -3, -3, -4, -4]]
    assert found[2] == [[0, 0, -1, -1, -2, -2], [-3, -3, -4, -4, -5, -5]]


def test_latents_can_be_neither_mirrored_nor_cropped(latents: Path) -> None:
    for modality in ("latent", "audio_latent"):
        with refused("windows.augmentation", f"{modality} of {latents}", "flip is 0.5"):
            WindowDataset(latents, modalities=("controls", modality), flip=0.5)
        with refused("windows.augmentation", f"{modality} of {latents}", "crop (12, 20)"):
            WindowDataset(latents, modalities=(modality,), crop=(12, 20))
    WindowDataset(latents, modalities=("controls",), flip=0.5)


PACKED = [3, 9, 2, 1, 12, 4, 5, 6, 1, 1]  # frames of each episode


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_numbered(tmp_path_factory.mktemp("mixed"), PACKED)


def clips(windows: WindowDataset, number: int) -> list[tuple[str, int, int]]:
    """(episode, first frame, last frame) of each clip of a window."""
    where = windows.describe(number)
    return [(clip["episode"], *clip["frames"]) for clip in (where, *where.get("packed_with", []))]


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 14), stride=st.integers(1, 3), hop=st.integers(1, 3))
def test_packs_hold_every_frame_of_short_episodes(mixed: Path, length: int, stride: int, hop: int) -> None:
    windows = WindowDataset(mixed, modalities=("controls",), length=length, stride=stride, hop=hop, pack=True)
    span, seen, taken = (length - 1) * stride + 1, {}, {}
    for number in range(len(windows)):
        sample, filled = windows[number], 0
        assert sample["document"].shape == (length,)
        for document, (episode, first, last) in enumerate(clips(windows, number)):
            frames = range(first, last + 1, stride)
            place = slice(filled, filled + len(frames))
            assert sample["document"][place].tolist() == [document] * len(frames)
            assert sample["axes"][filled, 0] == first
            assert sample["axes"][place, 1].tolist() == [1] + [stride] * (len(frames) - 1)  # of this clip alone
            assert not sample["axes"][place].isnan().any()
            filled += len(frames)
            seen.setdefault(episode, set()).update(frames)
            taken.setdefault(episode, []).append(first)
        for name, padding in (("document", -1), ("axes", 0), ("buttons", 0)):
            assert (sample[name][filled:] == padding).all()
    for number, frames in enumerate(PACKED):
        name = f"e{number}"
        if frames < span:
            assert sorted(taken[name]) == list(range(0, min(stride, frames), hop))  # each once
            assert hop > 1 or seen[name] == set(range(frames))
        elif frames >= length * stride and hop == 1:
            assert seen[name] == set(range(frames))
    assert [n for shard in windows.shard_windows() for n in shard] == list(range(len(windows)))


def test_long_episodes_are_windows_as_without_packing(mixed: Path) -> None:
    packing = WindowDataset(mixed, modalities=("controls",), length=6, pack=True)
    with pytest.warns(SkippedEpisodeWarning, match="7 short"):
        plain = WindowDataset(mixed, modalities=("controls",), length=6)
    assert "document" not in plain[0]
    long = [n for n in range(len(packing)) if PACKED[int(clips(packing, n)[0][0][1:])] >= 6]
    assert [clips(packing, n) for n in long] == [clips(plain, n) for n in range(len(plain))]
    for n, m in zip(long, range(len(plain)), strict=True):
        assert torch.equal(packing[n]["axes"], plain[m]["axes"])
        assert packing[n]["document"].tolist() == [0] * 6
    assert sorted(len(clips(packing, n)) for n in set(range(len(packing))) - set(long)) == [1, 3, 3]  # 17 of 18 frames
    batch = packing.batch(range(len(packing)))
    assert torch.equal(batch["document"], torch.stack([packing[n]["document"] for n in range(len(packing))]))


def test_a_damaged_clip_costs_its_pack_nothing_else(tmp_path: Path) -> None:
    root = make_numbered(tmp_path, [2, 2, 2, 1, 1])
    windows = WindowDataset(root, modalities=("controls",), length=6, pack=True)
    before = windows[0]
    assert before["document"].tolist() == [0, 0, 1, 1, 2, 2]
    overwrite(root, ShardIndex.load(root), 1, 1, "controls.npy", b"garbage")
    with pytest.warns(CorruptSampleWarning, match="e1, frame 1"):
        after = WindowDataset(root, modalities=("controls",), length=6, pack=True)[0]
    assert int(after["window"]) == 0
    assert after["document"].tolist() == [0, 0, 1, 1, -1, -1]
    assert torch.equal(after["axes"], torch.cat([before["axes"][[0, 1, 4, 5]], torch.zeros(2, 2)]))
    for episode in (0, 2):
        overwrite(root, ShardIndex.load(root), episode, 0, "controls.npy", b"garbage")
    with pytest.warns(CorruptSampleWarning):  # nothing is left of it
        assert int(WindowDataset(root, modalities=("controls",), length=6, pack=True)[0]["window"]) == 1


def test_pictures_and_latents_are_padded_with_zeros(tmp_path: Path, latents: Path) -> None:
    dataset = make_dataset(tmp_path, episodes=4, frames=8)
    sample = WindowDataset(dataset, modalities=("rgb", "depth", "flow"), length=10, stride=2, pack=True)[0]
    assert sample["document"].tolist() == [0] * 4 + [1] * 4 + [-1] * 2  # even frames, odd frames
    dense = WindowDataset(dataset, modalities=("rgb", "depth", "flow"), length=8)[0]
    motion = torch.tensor([0, 2, 2, 2, 1, 2, 2, 2])[:, None, None, None] * dense["flow"][1]  # constant, added up
    for name in ("rgb", "depth", "flow"):
        expected = torch.cat([dense[name][::2], dense[name][1::2]]) if name != "flow" else motion
        assert torch.equal(sample[name][:8], expected)
        assert not sample[name][8:].any()
    sample = WindowDataset(latents, modalities=("latent", "audio_latent"), length=9, pack=True)[0]
    assert sample["latent"][:, 0, 0, 0].tolist() == [*range(8), 0]
    with refused("windows.pack", f"audio of {dataset}", "audio_latent"):
        WindowDataset(dataset, modalities=("rgb", "audio"), length=9, pack=True)
