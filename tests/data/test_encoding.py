"""Latent datasets hold what the encoder gives, frame by frame, however often the encoding was interrupted."""

import fcntl
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from webdataset import WebDataset

from owl import models
from owl.data import codecs, jobs
from owl.data.encoder import FrameEncoder
from owl.data.encoding import encode_dataset
from owl.data.overview import DatasetReader
from owl.data.scan import write_index
from owl.data.shards import INDEX_NAME, INFO_NAME, DatasetInfo, ShardIndex, ShardWriter, shard_name
from owl.data.windows import CorruptSampleWarning, WindowDataset
from owl.models.image_autoencoder import ImageAutoencoder
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import in_child

SIZE, FRAMES = (32, 48), 7


def make_encoder(seed: int = 0, **changes: object) -> FrameEncoder:
    torch.manual_seed(seed)
    arguments: dict = {"size": SIZE, "latent_size": (4, 6), "latent_channels": 4, "widths": [8, 16, 16]}
    network = ImageAutoencoder(**(arguments | {"blocks": [1, 1, 1]} | changes)).eval()
    return FrameEncoder(network, models.fingerprint(network.encoder), "tests.Network", f"runs/{seed}/last.ckpt")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoder") / "source"
    return make_dataset(root, 4, FRAMES, SIZE, ("rgb", "audio", "controls"))


@pytest.fixture(scope="module")
def encoded(source: Path) -> Path:
    encode_dataset([make_encoder()], str(source), source.parent / "latents", keep=["controls", "rgb"], batch_size=3)
    return source.parent / "latents"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_latent_is_the_mean_of_its_frame(source: Path, encoded: Path) -> None:
    network = make_encoder().network
    for split in ("train", "validation", "test"):
        pictures = WindowDataset(source, split, ("rgb", "controls"), length=FRAMES)
        latents = WindowDataset(encoded, split, ("latent", "controls", "rgb"), length=FRAMES)
        assert len(pictures) == len(latents) == (2 if split == "train" else 1)
        for window in range(len(pictures)):
            assert pictures.describe(window) == latents.describe(window)
            with torch.inference_mode():
                expected = network.encode(pictures[window]["rgb"].float() / 127.5 - 1).mean  # type: ignore[operator]
            found = latents[window]
            torch.testing.assert_close(found["latent"], expected, atol=1e-5, rtol=2**-10)
            assert torch.equal(found["rgb"], pictures[window]["rgb"])
            assert torch.equal(found["axes"], pictures[window]["axes"])


def test_it_is_described_like_its_source(source: Path, encoded: Path) -> None:
    original, info, encoder = DatasetInfo.load(source), DatasetInfo.load(encoded), make_encoder()
    assert (info.fps, info.size, info.splits) == (original.fps, original.size, original.splits)
    assert list(info.modalities) == ["latent", "rgb", "controls"]
    assert info.modalities["controls"] == original.modalities["controls"]
    latent = info.modalities["latent"]
    assert {key: value for key, value in latent.items() if key not in ("mean", "std")} == {
        "extension": "latent.npy",
        "encoding": "npy float16[c, h, w]",
        "shape": [4, 4, 6],
        "posterior": "mean",
        "encoder": {
            "fingerprint": encoder.fingerprint,
            "class_path": "tests.Network",
            "checkpoint": "runs/0/last.ckpt",
        },
    }
    assert info.source == {
        "kind": "encoded",
        "path": str(source),
        "identity": original.identity(ShardIndex.load(source)),
        "checkpoint": "runs/0/last.ckpt",
    }


def test_statistics_are_those_of_the_training_split(encoded: Path) -> None:
    windows = WindowDataset(encoded, "train", ("latent",), length=FRAMES)
    values = torch.cat([windows[0]["latent"], windows[1]["latent"]]).double()
    latent = DatasetInfo.load(encoded).modalities["latent"]
    np.testing.assert_allclose(latent["mean"], values.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(latent["std"], values.std((0, 2, 3), correction=0), rtol=1e-9)


def test_kept_members_are_the_same_bytes_and_other_tools_read_them(source: Path, encoded: Path) -> None:
    before, after = DatasetReader(str(source)), DatasetReader(str(encoded))
    for episode in range(4):
        for frame in range(FRAMES):
            for modality in ("rgb", "controls"):
                assert after.content(modality, episode, frame) == before.content(modality, episode, frame)
    samples = list(WebDataset(str(encoded / shard_name(1)), shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"episode-001/{frame:06d}" for frame in range(FRAMES)]
    assert [key for key in samples[0] if key[0] != "_"] == ["latent.npy", "rgb.jpg", "controls.npy"]
    np.testing.assert_array_equal(samples[3]["latent.npy"], after.frame("latent", 1, 3))
    assert samples[3]["latent.npy"].dtype == np.float16


def test_controls_are_kept_by_default_and_a_source_without_them_gives_latents_alone(
    source: Path, tmp_path: Path
) -> None:
    info = encode_dataset([make_encoder()], str(source), tmp_path / "a")
    assert list(info.modalities) == ["latent", "controls"]
    bare = make_dataset(tmp_path / "bare", 3, 2, SIZE, ("rgb",))
    assert list(encode_dataset([make_encoder()], str(bare), tmp_path / "b").modalities) == ["latent"]


@pytest.mark.parametrize("call", [1, 4, 6])
@pytest.mark.parametrize("sample", [False, True])
def test_killed_and_continued_it_ends_with_the_same_bytes(
    source: Path, tmp_path: Path, call: int, sample: bool
) -> None:
    """Three batches an episode and an episode a shard; killed in the first, second and at the end of the second."""
    encoder = make_encoder()

    def encode(folder: str) -> None:
        encode_dataset([encoder], str(source), tmp_path / folder, sample=sample, batch_size=3)

    def die() -> int:
        encode_frames, calls = encoder.network.encode, []

        def encode_until(image: torch.Tensor) -> object:
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode_frames(image)  # type: ignore[operator]

        encoder.network.encode = encode_until  # type: ignore[assignment]
        encode("killed")
        return 0

    encode("whole")
    assert in_child(die) == -signal.SIGKILL
    left = contents(tmp_path / "killed")
    assert INDEX_NAME not in left
    assert sum(name.endswith(".tar") for name in left) == (call - 1) // 3
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.tar")}
    encode("killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_killed_between_statistics_and_index_it_ends_with_the_same_bytes(encoded: Path, source: Path) -> None:
    whole = contents(encoded)
    (encoded / INDEX_NAME).unlink()
    encode_dataset([make_encoder()], str(source), encoded, keep=["controls", "rgb"])
    assert contents(encoded) == whole


def test_a_dataset_with_an_index_but_no_statistics_is_completed(encoded: Path, source: Path) -> None:
    """Killed after the last shard, and then repaired."""
    whole = contents(encoded)
    info = DatasetInfo.load(encoded)
    for statistic in ("mean", "std"):
        del info.modalities["latent"][statistic]
    info.save(encoded)
    assert contents(encoded) != whole
    encode_dataset([make_encoder()], str(source), encoded, keep=["controls", "rgb"])
    assert contents(encoded) == whole


def test_samples_differ_from_means_by_the_posterior_s_noise(source: Path, encoded: Path, tmp_path: Path) -> None:
    info = encode_dataset([make_encoder()], str(source), tmp_path / "drawn", sample=True)
    assert info.modalities["latent"]["posterior"] == "sample"
    drawn, means = (
        torch.stack([window["latent"] for window in WindowDataset(root, "train", ("latent",), length=FRAMES)])
        for root in (tmp_path / "drawn", encoded)
    )
    noise = (drawn - means) / np.exp(-4 / 2)  # the log-variance of an untrained encoder
    assert 0.9 < noise.std() < 1.1
    for one, other in ((noise[0], noise[1]), (noise[:, :-1], noise[:, 1:])):  # of episodes, of frames
        assert abs((one * other).mean()) < 0.1


def test_a_finished_dataset_is_left_as_it_is(source: Path, encoded: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in encoded.iterdir()}
    encode_dataset([make_encoder()], str(source), encoded, keep=["rgb", "controls"])
    assert {path: path.stat().st_mtime_ns for path in encoded.iterdir()} == before


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    before = contents(folder) if folder.exists() else None
    yield
    assert (contents(folder) if folder.exists() else None) == before


def test_another_encoder_or_source_is_refused_by_name(source: Path, encoded: Path, tmp_path: Path) -> None:
    keep = ["rgb", "controls"]
    other = make_dataset(tmp_path / "other", 4, FRAMES, SIZE, ("rgb", "controls"), seed=1)
    code, folder = "dataset.other-settings", str(encoded)
    encoders = ("runs/0/last.ckpt", make_encoder(0).fingerprint, "runs/1/last.ckpt", make_encoder(1).fingerprint)
    with untouched(encoded):
        with refused(code, folder, *encoders):
            encode_dataset([make_encoder(1)], str(source), encoded, keep=keep)
        with refused(code, folder, str(source), str(other)):
            encode_dataset([make_encoder()], str(other), encoded, keep=keep)
        with refused(code, folder, "posterior mean, now it is sample"):
            encode_dataset([make_encoder()], str(source), encoded, keep=keep, sample=True)
        with refused(code, folder, "modalities latent, rgb, controls, now it is latent, controls"):
            encode_dataset([make_encoder()], str(source), encoded)


def test_what_cannot_be_encoded_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with refused("dataset.size", str(source), "32x48", "32x32"):
        encode_dataset([make_encoder(size=(32, 32), latent_size=(4, 4))], str(source), out)
    with refused("dataset.modalities", str(source), "no depth", "rgb, audio, controls"):
        encode_dataset([make_encoder()], str(source), out, keep=["depth"])
    unknown = replace(make_encoder(), network=SimpleNamespace(modalities={"smell": 3}))
    with refused("dataset.modalities", "'smell'", "rgb, depth"):
        encode_dataset([unknown], str(source), out)
    both = tmp_path / "both"
    encode_dataset([make_encoder()], str(source), both, keep=["rgb"])
    with refused("dataset.modalities", f"latent of {both}"):
        encode_dataset([make_encoder(1)], str(both), out, keep=["latent"])
    with refused("arguments.too-small", "batch_size is 0", "at least 1"):
        encode_dataset([make_encoder()], str(source), out, batch_size=0)
    sound = make_dataset(tmp_path / "sound", 3, 2, SIZE, ("audio",))
    with refused("dataset.modalities", str(sound), "no rgb"):
        encode_dataset([make_encoder()], str(sound), out)
    with untouched(sound), refused("dataset.occupied", str(sound), "synthetic"):
        encode_dataset([make_encoder()], str(source), sound)
    own = make_dataset(tmp_path / "own", 3, 2, SIZE, ("rgb",))
    info = DatasetInfo.load(own)
    info.splits = {"train": [], "validation": info.splits["train"]}
    info.save(own)
    with untouched(own), refused("dataset.empty-split", f"train split of {own}"):
        encode_dataset([make_encoder()], str(own), out)
    (own / INFO_NAME).unlink()
    with untouched(own), refused("dataset.occupied", str(own), "dataset.json"):
        encode_dataset([make_encoder()], str(source), own)
    assert not out.exists()


def test_two_processes_do_not_write_into_one_folder(
    encoded: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LOCK_PATIENCE", 0.1)
    root = tmp_path / "latents"
    shutil.copytree(encoded, root)
    (root / INDEX_NAME).unlink()  # encoding that was killed
    with open(root / INFO_NAME) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with untouched(root), refused("dataset.locked", str(root)):
            encode_dataset([make_encoder()], str(source), root, keep=["rgb", "controls"])


def test_an_encoder_that_diverged_is_reported(source: Path, tmp_path: Path) -> None:
    encoder = make_encoder()
    next(encoder.network.parameters()).data.fill_(torch.nan)
    with refused("latents.non-finite", "episode-000", "float16"):
        encode_dataset([encoder], str(source), tmp_path / "out")
    assert not list((tmp_path / "out").glob("shard-*"))


def test_an_episode_ends_before_a_damaged_picture(tmp_path: Path) -> None:
    own = make_dataset(tmp_path / "own", 4, FRAMES, SIZE, ("rgb", "controls"))
    index = ShardIndex.load(own)
    shard = own / shard_name(1)
    data = bytearray(shard.read_bytes())
    data[int(index.offsets[index.episode_row[1] + 4, 0] + 300)] ^= 1
    shard.write_bytes(data)
    with pytest.warns(UserWarning, match=r"episode-001, frame 4 .*rgb"):
        encode_dataset([make_encoder()], str(own), tmp_path / "out", batch_size=3)
    assert ShardIndex.load(tmp_path / "out").episode_frames.tolist() == [7, 4, 7, 7]


def test_a_latent_that_is_not_finite_or_of_another_shape_costs_its_windows_only(encoded: Path, tmp_path: Path) -> None:
    info = DatasetInfo.load(encoded)
    DatasetInfo(info.fps, info.size, {"latent": info.modalities["latent"]}, {"train": ["a"]}, {}, "test").save(tmp_path)
    bad = {2: np.full((4, 4, 6), np.nan, np.float16), 5: np.zeros((4, 6, 4), np.float16)}
    with ShardWriter(tmp_path, 0) as writer:
        for frame in range(9):
            latent = bad.get(frame, np.full((4, 4, 6), frame, np.float16))
            writer.write("a", frame, {"latent.npy": codecs.encode_array(latent)})
    write_index(tmp_path)
    windows = WindowDataset(tmp_path, modalities=("latent",))
    with pytest.warns(CorruptSampleWarning) as caught:
        delivered = [int(windows[number]["window"]) for number in range(9)]
    assert [number for number, window in enumerate(delivered) if number != window] == [2, 5]
    messages = [str(warning.message) for warning in caught]
    assert "frame 2: member a/000002.latent.npy is corrupt (it holds NaN or infinity)" in messages[0]
    assert "it has shape [4, 6, 4], dataset.json says [4, 4, 6]" in messages[1]
