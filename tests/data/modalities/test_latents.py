"""Latents of sound keep their own clock."""

from pathlib import Path

import numpy as np
import pytest
import torch

from owl.data.modalities.base import Clock, Sampling
from owl.data.modalities.latents import AudioLatent, Latent
from owl.data.overview import DatasetReader, draw_contact_sheet
from owl.data.scan import write_index
from owl.data.shards import DatasetInfo, ShardIndex, ShardWriter
from owl.data.verification import verify_members
from owl.data.windows import CorruptSampleWarning, WindowDataset
from tests.helpers.errors import refused

FPS, RATE, CHANNELS = 35.0, 44_100 / 512, 3  # a codec of 512 samples a token: 2.46 tokens a frame


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Twenty frames whose tokens are numbered, as a codec beside the video gives them."""
    description = {"extension": AudioLatent.extension, "shape": [CHANNELS], "rate": RATE}
    DatasetInfo(FPS, (24, 40), {"audio_latent": description}, {"train": ["a"]}, {}, "test").save(tmp_path)
    bounds = np.round(np.arange(21) * RATE / FPS).astype(int)
    numbers = np.repeat(np.arange(bounds[-1], dtype=np.float16)[:, None], CHANNELS, 1)
    with ShardWriter(tmp_path, 0) as writer:
        for frame in range(20):
            member = AudioLatent.encode(numbers[bounds[frame] : bounds[frame + 1]])
            writer.write("a", frame, {AudioLatent.extension: member})
    write_index(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (7, 1), (4, 3)])
def test_tokens_at_any_rate_are_unbroken_and_as_many_in_every_window(tokens: Path, length: int, stride: int) -> None:
    windows = WindowDataset(tokens, modalities=("audio_latent",), length=length, stride=stride)
    expected = int(((length - 1) * stride + 1) * RATE / FPS)
    assert windows.shapes() == {"audio_latent": ((expected, CHANNELS), torch.float32)}
    for number in range(len(windows)):
        found = windows[number]["audio_latent"]
        assert found.shape == (expected, CHANNELS)
        assert found[0, 0] == round(number * RATE / FPS)
        assert (found.diff(dim=0) == 1).all()


def test_a_frame_with_more_or_fewer_tokens_than_its_rate_gives_is_damaged(tokens: Path) -> None:
    windows = WindowDataset(tokens, modalities=("audio_latent",))
    index = ShardIndex.load(tokens)
    with ShardWriter(tokens, 0) as writer:
        for frame in range(20):
            count = int(index.sizes[frame, 0] - 128) // (2 * CHANNELS) if frame != 4 else 5
            member = AudioLatent.encode(np.zeros((count, CHANNELS), np.float16))
            writer.write("a", frame, {AudioLatent.extension: member})
    write_index(tokens)
    (problems,) = verify_members(DatasetReader(str(tokens)))
    assert len(problems) == 1
    assert "a/000004.audio_latent.npy" in problems[0]
    assert "2 or 3 of 3 channels" in problems[0]
    windows = WindowDataset(tokens, modalities=("audio_latent",))
    with pytest.warns(CorruptSampleWarning, match="frame 4"):
        assert int(windows[4]["window"]) != 4


@pytest.mark.parametrize(
    ("changes", "tokens_of_message"),
    [
        ({"shape": [2, CHANNELS]}, ["shape [2, 3] and rate 86"]),
        ({"rate": None}, ["shape [3] and rate None"]),
        ({"rate": 0}, ["rate 0"]),
    ],
)
def test_a_rate_is_declared_once_and_checked_once(tokens: Path, changes: dict, tokens_of_message: list[str]) -> None:
    info = DatasetInfo.load(tokens)
    info.modalities["audio_latent"] |= changes
    info.save(tokens)
    with refused("dataset.rate", f"audio_latent of {tokens}", *tokens_of_message):
        WindowDataset(tokens, modalities=("audio_latent",))


def test_tokens_at_a_rate_of_their_own_cannot_be_packed_or_cropped(tokens: Path) -> None:
    with refused("windows.pack", f"audio_latent of {tokens}"):
        WindowDataset(tokens, modalities=("audio_latent",), length=30, pack=True)
    with refused("windows.augmentation", f"audio_latent of {tokens}"):
        WindowDataset(tokens, modalities=("audio_latent",), crop=(8, 8))


def test_a_dataset_of_sound_alone_has_a_sheet(tokens: Path) -> None:
    assert draw_contact_sheet(DatasetReader(str(tokens))).width > 1000


def test_a_clock_counts_what_every_stretch_holds() -> None:
    clock = Clock(44_100, 60_000 / 1001)
    bounds = np.round(np.arange(200) * clock.rate / clock.fps).astype(int)
    for frames in (1, 2, 7, 50):
        counts = bounds[frames:] - bounds[:-frames]
        assert clock.least(frames) <= counts.min() <= counts.max() <= clock.most(frames)
    assert Clock(44_100, 35.0).least(1) == Clock(44_100, 35.0).most(1) == 1260


@pytest.mark.parametrize(
    ("rate", "fps", "expected"),
    [
        (60, 24, [20, 30]),  # 24 frames a second, and 60 tokens: 2.5 each
        (60, 30_000 / 1001, [20, 30]),
        (60, 60_000 / 1001, [30, 60]),
        (60, 30, [30]),
        (44_100, 24, [44_100 / 1838, 44_100 / 1837]),
        (10, 24, [10]),  # fewer tokens than frames
    ],
)
def test_a_clock_names_the_nearest_frame_rates_with_whole_frames(rate: float, fps: float, expected: list) -> None:
    found = Clock(rate, fps).whole_fps()
    assert found == pytest.approx(expected)
    for near in found:
        assert Clock(rate, near).least(1) == Clock(rate, near).most(1) >= 1


@pytest.mark.parametrize(("kind", "shape"), [(Latent, [3, 2, 4]), (AudioLatent, [2, CHANNELS])])
def test_descriptions_contain_the_shape_of_a_frame_in_windows(kind: type[Latent], shape: list[int]) -> None:
    described, sampling = {"shape": shape}, Sampling("data", FPS, (24, 40), length=4, stride=3)
    ((found, _),) = kind("latent", described, sampling).shapes().values()
    assert found == (4, *kind.in_windows(described, 3)["shape"])
