"""Importing: every frame once, in order, with its sound; the same bytes however it was interrupted; plain refusals."""

import os
import resource
import shutil
import signal
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from owl.data import importer, jobs
from owl.data.codecs import decode_array, decode_flow, decode_rgb
from owl.data.footage import Recording
from owl.data.importer import cut_episodes, import_footage
from owl.data.overview import DatasetReader
from owl.data.shards import INDEX_NAME, INFO_NAME, ShardWriter, shard_name, writing
from owl.data.verification import missing_episodes, verify_members
from owl.data.video import SAMPLE_RATE, VideoFacts
from owl.data.windows import WindowDataset
from tests.helpers.errors import refused
from tests.helpers.tiny import in_child
from tests.helpers.videos import RATE, SIZE, frame_number, make_recording, make_video


def contents(root: Path) -> dict[str, bytes]:
    """Every byte, but for the version of the code: a commit between two imports of a test is no failure."""
    files = {file.name: file.read_bytes() for file in sorted(root.iterdir())}
    files[INFO_NAME] = b"\n".join(line for line in files[INFO_NAME].splitlines() if b'"code_version"' not in line)
    return files


def decoded(root: Path, modality: str) -> list[np.ndarray]:
    """All members of a modality, in the order of shards and time."""
    reader = DatasetReader(str(root))
    decode = {"rgb": decode_rgb, "flow": decode_flow}.get(modality, decode_array)
    return [
        decode(reader.content(modality, episode, frame))
        for episode, frames in enumerate(reader.index.episode_frames)
        for frame in range(int(frames))
    ]


def recording(frames: int, name: str = "a.mp4") -> Recording:
    rate = Fraction(RATE)
    return Recording(name, VideoFacts(Path(name), Fraction(0), frames / rate, rate, Fraction(1), SIZE, False), 0)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of several containers, sizes, rates and lengths, some unfit, among files that are no videos."""
    root = tmp_path_factory.mktemp("footage")
    make_video(root / "a.mp4", 60, sound=48_000, flashes=[10, 40])
    make_video(root / "nested" / "b b.mkv", 50, rate=25, size=(96, 96))
    make_video(root / "c.webm", 30, codec="libvpx-vp9")
    make_video(root / "one.mp4", 1)
    whole = (root / "a.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "empty.mp4").touch()
    (root / "readme.txt").write_text("these are films")
    (root / "cover.jpg").write_bytes(b"\xff\xd8\xff")
    (root / ".hidden.mp4").write_bytes(b"no")
    return root


def test_a_folder_of_videos_becomes_a_dataset(videos: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="is left out") as caught:
        imported = import_footage(videos, tmp_path / "data", flow=False)
    assert sorted(str(warning.message).split(" ")[0] for warning in caught) == ["cut.mp4", "empty.mp4"]
    assert list(imported.episodes.values()) == [60, 30, 60, 1]  # a, c, b at 30 instead of 25 frames/s, one
    assert sorted(map(len, imported.info.splits.values())) == [1, 1, 2]
    reader = DatasetReader(str(tmp_path / "data"))
    assert (reader.info.fps, reader.info.size) == (30, SIZE)
    assert not missing_episodes(reader)
    assert not any(verify_members(reader))
    pictures = [frame_number(rgb) for rgb in decoded(tmp_path / "data", "rgb")]
    assert pictures[:60] == [255 if frame in (10, 40) else frame for frame in range(60)]
    assert pictures[60:90] == list(range(30))
    assert set(pictures[90:150]) == set(range(50))
    sound = decoded(tmp_path / "data", "audio")
    assert [len(samples) for samples in sound] == [SAMPLE_RATE // 30] * 151
    loud = [frame for frame, samples in enumerate(sound) if np.abs(samples.astype(int)).mean() > 2000]
    assert loud == [11, 41]  # what sounds while frame 10 is shown leads to frame 11
    assert not any(sound[first].any() for first in (0, 60, 90, 150))  # nothing led to a recording's first frame
    train = WindowDataset(str(tmp_path / "data"), "train", ["rgb", "audio"], length=4)
    assert train[0]["audio"].shape == (2, 4 * SAMPLE_RATE // 30)


def test_a_short_clip_has_all_splits_and_every_frame_once(tmp_path: Path) -> None:
    make_video(tmp_path / "clip.mp4", 132, rate=25, sound=48_000, flashes=[100])
    imported = import_footage(tmp_path / "clip.mp4", tmp_path / "data", size=(24, 32), flow=False)
    assert {split: len(names) for split, names in imported.info.splits.items()} == {
        "train": 6,
        "validation": 1,
        "test": 1,
    }
    pictures = [frame_number(rgb) for rgb in decoded(tmp_path / "data", "rgb")]
    assert pictures == [255 if frame == 100 else frame for frame in range(132)]
    loud = [i for i, s in enumerate(decoded(tmp_path / "data", "audio")) if np.abs(s.astype(int)).mean() > 2000]
    assert loud == [101]


@pytest.mark.parametrize("lengths", [[1], [2], [3], [5], [132], [1000], [100_000], [1, 1], [2, 300], [7, 800, 2000]])
def test_episodes_are_bounded_and_hold_every_frame_once(lengths: list[int]) -> None:
    recordings = [recording(frames, f"{number}.mp4") for number, frames in enumerate(lengths)]
    episodes = cut_episodes(recordings, Fraction(RATE))
    for one, frames in zip(recordings, lengths, strict=True):
        mine = [episode for episode in episodes if episode.recording is one]
        assert [e.first for e in mine] == [sum(e.frames for e in mine[:k]) for k in range(len(mine))]
        assert sum(e.frames for e in mine) == frames
    assert all(0 < episode.frames < 2 * importer.EPISODE_FRAMES for episode in episodes)
    assert len({episode.name for episode in episodes}) == len(episodes) >= min(3, sum(lengths))


def test_flow_points_back_and_is_zero_where_an_episode_starts(tmp_path: Path) -> None:
    texture = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (160, 400, 3), np.uint8), (0, 0), 3)
    texture = cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX)

    def slide(frame: int, size: tuple[int, int], flash: bool) -> np.ndarray:
        x, y = 4 * frame, 2 * frame  # the camera goes right and down, so what is seen here was there a frame ago
        return np.ascontiguousarray(texture[y : y + size[0], x : x + size[1]])

    make_video(tmp_path / "a.mp4", 30, size=(96, 160), draw=slide)
    import_footage(tmp_path / "a.mp4", tmp_path / "data", flow=True)
    flow = decoded(tmp_path / "data", "flow")
    assert flow[0].shape == (48, 80, 2)
    for frame, field in enumerate(flow):
        if frame in (0, 10, 20):
            assert np.abs(field).max() == 0
        else:
            assert np.median(field, (0, 1)) == pytest.approx([4, 2], abs=0.3)


def test_unequal_shapes_are_cut_to_the_wanted_one(tmp_path: Path) -> None:
    make_video(tmp_path / "v" / "a.mp4", 4, size=(96, 64))
    make_video(tmp_path / "v" / "b.mp4", 4, size=(64, 192))
    import_footage(tmp_path / "v", tmp_path / "data", size=(32, 32))
    assert {rgb.shape for rgb in decoded(tmp_path / "data", "rgb")} == {(32, 32, 3)}


def test_without_any_sound_track_or_on_request_there_is_no_sound(videos: Path, tmp_path: Path) -> None:
    assert "audio" not in import_footage(videos / "c.webm", tmp_path / "silent").info.modalities
    assert "audio" not in import_footage(videos / "a.mp4", tmp_path / "muted", audio=False).info.modalities


def test_a_video_whose_end_cannot_be_decoded_is_kept_up_to_there(tmp_path: Path) -> None:
    whole = bytearray(make_video(tmp_path / "a.mp4", 132).read_bytes())
    begin, end = whole.index(b"mdat") + 4, whole.index(b"moov") - 4
    lost = begin + (end - begin) * 3 // 4
    whole[lost:end] = bytes(end - lost)  # the table of contents still promises 132 frames
    (tmp_path / "a.mp4").write_bytes(whole)
    with pytest.warns(UserWarning, match=r"a.mp4: only \d+ of its 132 frames"):
        imported = import_footage(tmp_path / "a.mp4", tmp_path / "data")
    pictures = [frame_number(rgb) for rgb in decoded(tmp_path / "data", "rgb")]
    assert 50 < len(pictures) < 110
    assert pictures[:-1] == list(range(len(pictures) - 1))  # the frame that was hit half may repeat the one before
    assert sum(imported.episodes.values()) == len(pictures)
    assert len(imported.episodes) < 8
    assert all(imported.info.splits.values())
    assert not missing_episodes(DatasetReader(str(tmp_path / "data")))


def import_clip(videos: Path, root: Path) -> None:
    """Import a clip in several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importer, "SHARD_FRAMES", 30)
        import_footage(videos / "a.mp4", root, flow=True)


@pytest.fixture(scope="module")
def uninterrupted(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What becomes of the clip when nothing disturbs its import."""
    root = tmp_path_factory.mktemp("imported") / "data"
    import_clip(videos, root)
    assert len(list(root.glob("shard-*.tar"))) == 3
    return root


def test_killed_and_run_again_it_ends_with_the_same_bytes(videos: Path, uninterrupted: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"

    def killed() -> int:
        write, count = ShardWriter.write, iter(range(60))

        def deadly(self: ShardWriter, *arguments: Any) -> None:
            if next(count) == 25:
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, *arguments)

        ShardWriter.write = deadly  # type: ignore[method-assign]
        import_clip(videos, root)
        return 0

    assert in_child(killed) == -signal.SIGKILL
    assert (root / (shard_name(1) + ".partial")).exists()
    assert (root / INFO_NAME).exists()
    assert not (root / INDEX_NAME).exists()
    kept = (root / shard_name(0)).stat()
    import_clip(videos, root)
    assert contents(root) == contents(uninterrupted)
    assert (root / shard_name(0)).stat().st_mtime_ns == kept.st_mtime_ns  # the complete shard was not made again


def test_any_missing_shard_is_made_again_with_the_same_bytes(videos: Path, uninterrupted: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(uninterrupted, root)
    for number in (0, 2):
        (root / shard_name(number)).unlink()
    (root / INDEX_NAME).unlink()
    import_clip(videos, root)
    assert contents(root) == contents(uninterrupted)


def test_two_imports_do_not_write_into_one_folder(
    videos: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LOCK_PATIENCE", 0.1)
    root = tmp_path / "data"
    shutil.copytree(uninterrupted, root)
    (root / INDEX_NAME).unlink()  # an import that was killed
    before = contents(root)
    with (
        writing(root),
        refused("dataset.locked", str(root)),
    ):
        import_footage(videos / "a.mp4", root, flow=True)
    assert contents(root) == before


def test_a_full_disk_is_one_sentence_and_the_import_continues_afterwards(
    videos: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    limit = (uninterrupted / shard_name(0)).stat().st_size // 2  # a limit on files stands for that of the disk

    def full() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with refused("dataset.unwritable", f"{root} cannot be written (File too large)"):
            import_clip(videos, root)
        return 0

    assert in_child(full) == 0
    assert [file.name for file in root.iterdir()] == [INFO_NAME]
    import_clip(videos, root)
    assert contents(root) == contents(uninterrupted)


def test_a_folder_that_cannot_be_made_is_one_sentence(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused("dataset.unwritable", str(tmp_path / "file" / "data"), "Not a directory"):
        import_footage(videos / "a.mp4", tmp_path / "file" / "data")


def test_other_options_or_footage_are_refused_with_both_values(
    videos: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    before = contents(uninterrupted)
    other = make_video(tmp_path / "a.mp4", 60, sound=48_000)
    (size, longer) = ((videos / "a.mp4").stat().st_size, other.stat().st_size)
    for source, options, *tokens in (
        (videos / "a.mp4", {"size": (24, 32)}, "size 48x64, now it is 24x32"),
        (videos / "a.mp4", {"fps": 12.5}, "fps 30, now it is 12.5"),
        (videos / "a.mp4", {"flow": False}, "rgb, flow, audio, now it is rgb, audio"),
        (other, {}, "a.mp4", str(size), str(longer)),
        (make_recording(tmp_path / "owl", []), {}, "videos, now it is owl-control"),
    ):
        with refused("dataset.other-settings", str(uninterrupted), *tokens):
            import_footage(source, uninterrupted, **{"flow": True, **options})
    assert contents(uninterrupted) == before


def test_refusals_before_anything_is_written(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no film")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / shard_name(0)).write_bytes(bytes(1024))
    data = tmp_path / "data"
    empty = ["1 recordings", str(videos / "empty.mp4"), "empty.mp4: the file is empty"]
    for source, root, options, code, tokens in (
        (tmp_path / "nowhere", data, {}, "footage.missing", [str(tmp_path / "nowhere")]),
        (tmp_path / "texts", data, {}, "footage.unusable", ["nothing", str(tmp_path / "texts")]),
        (videos / "empty.mp4", data, {}, "footage.unusable", empty),
        (videos, videos, {}, "footage.is-dataset", [str(videos)]),
        (videos / "a.mp4", "s3://bucket/data", {}, "dataset.not-local", ["s3://bucket/data"]),
        (videos / "a.mp4", tmp_path / "shards", {}, "dataset.occupied", [str(tmp_path / "shards"), "dataset.json"]),
        (videos / "a.mp4", data, {"flow": True, "size": (16, 16)}, "flow.size", ["16x16", "64x64"]),
    ):
        with refused(code, *tokens):
            import_footage(source, root, **options)
    assert not data.exists()
    assert [file.name for file in (tmp_path / "shards").iterdir()] == [shard_name(0)]


def test_a_folder_given_as_a_dot_may_hold_names_that_look_like_urls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_video(tmp_path / "v" / "a.mp4", 10).rename(tmp_path / "v" / "12:30:00.mp4")
    monkeypatch.chdir(tmp_path / "v")
    imported = import_footage(".", tmp_path / "data")
    assert set(imported.recording_of.values()) == {"12:30:00.mp4"}
    assert sum(imported.episodes.values()) == 10


def test_what_was_wrong_with_a_clock_is_said_once(tmp_path: Path) -> None:
    part = make_video(tmp_path / "v" / "part.ts", 60, sound=48_000, flashes=[10])
    part.write_bytes(2 * part.read_bytes())
    with pytest.warns(UserWarning, match="part.ts: its clock jumps") as caught:
        imported = import_footage(tmp_path / "v", tmp_path / "data")
    assert len(caught) == 1
    assert len(imported.problems["part.ts"]) == 1
    pictures = [frame_number(rgb) for rgb in decoded(tmp_path / "data", "rgb")]
    assert pictures == 2 * [255 if frame == 10 else frame for frame in range(60)]
    loud = [i for i, s in enumerate(decoded(tmp_path / "data", "audio")) if np.abs(s.astype(int)).mean() > 2000]
    assert loud == [11, 71]


def test_a_dataset_inside_the_footage_is_not_footage(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", 10)
    first = import_footage(tmp_path, tmp_path / "data")
    (tmp_path / "data" / "stray.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    again = import_footage(tmp_path, tmp_path / "data")
    assert again.episodes == first.episodes
