"""Recording: complete, the same bytes however it was interrupted, and one sentence where it cannot continue."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch

from owl.data import game, jobs, recorder
from owl.data.geometry import Camera
from owl.data.overview import DatasetReader
from owl.data.recorder import GameRecording, record_game
from owl.data.shards import INDEX_NAME, INFO_NAME, DatasetInfo, ShardIndex
from owl.data.windows import WindowDataset
from tests.data.test_game import can_sound
from tests.helpers.camera import Footage, reprojection_gain
from tests.helpers.errors import refused
from tests.helpers.processes import living

LONG = GameRecording(
    frames=600, size=(48, 80), seed=3, workers=2, modalities=("depth", "flow")
)  # three episodes of 200
SOUND = ("audio",) if can_sound() else ()
SHORT = GameRecording(frames=30, size=(48, 80), workers=1, modalities=("depth", "flow", *SOUND))
MIXED = replace(SHORT, frames=60, scenario=["deathmatch", "freedoom2:MAP07"])  # six episodes of ten


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MIXED, recorded."""
    root = tmp_path_factory.mktemp("recorder") / "mixed"
    record_game(str(root), MIXED)
    return root


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What LONG becomes when one process records it without a break."""
    root = tmp_path_factory.mktemp("recorder") / "uninterrupted"
    record_game(str(root), replace(LONG, workers=1))
    return root


@pytest.fixture(autouse=True)
def single_worker_is_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the seconds that a new process imports for; the fixtures above, and several workers, have real ones."""
    run = recorder.run
    monkeypatch.setattr(recorder, "run", lambda job, root, workers: run(job, root, workers if workers > 1 else 0))


def contents(root: Path) -> dict[str, bytes]:
    """Every byte, but for the version of the code: a commit between two recordings of a test is no failure."""
    files = {file.name: file.read_bytes() for file in sorted(root.iterdir())}
    lines = files[INFO_NAME].splitlines()
    return {**files, INFO_NAME: b"\n".join(line for line in lines if b'"code_version"' not in line)}


def start(root: Path) -> subprocess.Popen:
    """LONG, from the command line, in a process of its own."""
    options = ["--frames", "600", "--size", "48x80", "--seed", "3", "--workers", "2", "--depth", "--flow"]
    return subprocess.Popen(
        [sys.executable, "-m", "owl", "data", "record", str(root), *options],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def are_recording(root: Path) -> bool:
    """Whether the games of both workers have started, some 30 frames ago."""
    return sum(partial.stat().st_size > 100_000 for partial in root.glob("shard-*.partial")) == 2


def wait_until_gone(processes: list[psutil.Process]) -> None:
    wait_until(lambda: not living(processes))


def test_a_dataset_holds_every_frame_with_every_modality(tmp_path: Path) -> None:
    info = record_game(str(tmp_path), SHORT)
    assert sorted(info.modalities) == sorted(["rgb", "depth", "flow", "controls", *SOUND])
    reader = DatasetReader(str(tmp_path))
    assert reader.index.episode_frames.tolist() == [10, 10, 10]
    splits = reader.info.splits
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [1, 1, 1]
    assert sorted(name for names in splits.values() for name in names) == sorted(reader.index.episodes)
    moved = 0
    for episode in range(3):
        for frame in range(10):
            members = {name: reader.frame(name, episode, frame) for name in reader.info.modalities}
            assert all(member is not None for member in members.values())
            assert members["rgb"].shape == (48, 80, 3)
            assert members["depth"].shape == (48, 80)
            assert members["flow"].shape == (24, 40, 2)
            assert frame > 0 or not members["flow"].any()
            moved += bool(members["flow"].any())
            assert members["controls"].shape == (6,)
            assert "audio" not in members or members["audio"].shape == (1260, 2)
    assert moved > 5  # the player stands still at first
    controls = reader.info.modalities["controls"]
    assert "the tic that brought frame t about" in controls["timing"]
    assert controls["mirror"]["buttons"]["MOVE_LEFT"] == "MOVE_RIGHT"


def test_recorded_frames_are_seen_again_by_depth_and_pose(tmp_path: Path) -> None:
    """The photometric error against the frame 4 earlier, once that is reprojected: on what stands still and is seen."""
    recording = GameRecording(120, (96, 160), "my_way_home", 4, ("depth", "pose", "labels"), workers=1)
    record_game(str(tmp_path), recording)
    windows = WindowDataset(tmp_path, "train", ("rgb", "depth", "pose", "labels"), length=40)
    sample = windows[0]
    names = windows.info.modalities["labels"]["names"]
    assert names == sorted(names)
    still = torch.tensor([name in ("Wall", "FloorCeilingSky") for name in names])[sample["classes"]]
    assert torch.equal(still, sample["labels"] < 2)
    camera = Camera(sample["pose"], sample["intrinsics"])
    shown = Footage(sample["rgb"].float(), sample["depth"], camera, still, windows.info.modalities["depth"])
    gain, share = reprojection_gain(shown)
    assert gain >= 2
    assert share > 0.6  # the rest has come into view


def test_a_recording_that_was_killed_at_its_end_gets_the_names_of_its_labels(tmp_path: Path) -> None:
    recording = GameRecording(9, (48, 80), modalities=("labels",), workers=1)
    record_game(str(tmp_path), recording)
    before, info = contents(tmp_path), DatasetInfo.load(tmp_path)
    del info.modalities["labels"]["names"]
    info.save(tmp_path)
    with refused("dataset.unfinished", str(tmp_path), "names"):
        WindowDataset(tmp_path, "train", ("labels",))
    record_game(str(tmp_path), recording)
    assert contents(tmp_path) == before


def test_a_restarted_scenario_starts_an_episode(tmp_path: Path) -> None:
    # its player often reaches the goal or is pushed out of the map within a hundred tics
    recording = GameRecording(600, (48, 80), "deadly_corridor", modalities=("flow",), workers=1)
    record_game(str(tmp_path), recording)
    reader = DatasetReader(str(tmp_path))
    names = reader.index.episodes.tolist()
    assert reader.index.episode_frames.sum() == 600
    assert any(name.endswith("-1") for name in names)
    assert sorted(name for split in reader.info.splits.values() for name in split) == sorted(names)
    split_of = {name: split for split, names in reader.info.splits.items() for name in names}
    for number, name in enumerate(names):
        assert split_of[name] == split_of[name[: len("episode-000000")]]  # the same take is not in two splits
        assert not reader.frame("controls", number, 0).any()
        assert not reader.frame("flow", number, 0).any()


def test_frames_are_divided_among_episodes_without_loss() -> None:
    for frames, longest in ((3, 500), (1000, 500), (1501, 500), (20_000, 500), (7, 2)):
        lengths = GameRecording(frames=frames, episode_frames=longest).episode_lengths()
        assert sum(lengths) == frames
        assert len(lengths) >= 3
        assert 1 <= min(lengths) <= max(lengths) <= longest
        assert max(lengths) - min(lengths) <= 1


def test_several_scenarios_take_turns_in_every_split(mixed: Path) -> None:
    reader = DatasetReader(str(mixed))
    names = [f"episode-{n:06d}-{('deathmatch', 'freedoom2-MAP07')[n % 2]}" for n in range(6)]
    assert reader.index.episodes.tolist() == names
    assert reader.info.source["scenario"] == ["deathmatch", "freedoom2:MAP07"]
    for split in ("train", "validation", "test"):
        assert sorted(name[15:] for name in reader.info.splits[split]) == ["deathmatch", "freedoom2-MAP07"]
    for number, name in enumerate(names):
        assert reader.frame("controls", number, 9).shape == (len(game.BUTTONS) + len(game.AXES),)
        assert reader.frame("depth", number, 9).shape == (48, 80)
        others = [other for other, its_name in enumerate(names) if its_name[15:] == name[15:] and other != number]
        assert all((reader.frame("rgb", number, 9) != reader.frame("rgb", other, 9)).any() for other in others)
    for number, scenario in ((2, "deathmatch"), (3, "freedoom2:MAP07")):  # what is called so is so
        seed = int(np.random.SeedSequence((0, number)).generate_state(1)[0])
        played = list(game.play(scenario, 10, (48, 80), seed))[9].rgb.astype(int)
        assert np.abs(reader.frame("rgb", number, 9) - played).mean() < 4


def test_an_interrupted_recording_of_several_scenarios_continues_to_the_same_bytes(mixed: Path, tmp_path: Path) -> None:
    root = tmp_path / "again"
    shutil.copytree(mixed, root)
    for name in (INDEX_NAME, "shard-000001.tar", "shard-000004.tar"):
        (root / name).unlink()
    record_game(str(root), replace(MIXED, scenario="deathmatch, freedoom2:MAP07", workers=2))
    assert contents(root) == contents(mixed)
    with refused(
        "dataset.other-settings", str(root), "['freedoom2:MAP07', 'deathmatch']"
    ):  # the order decides what an episode is
        record_game(str(root), replace(MIXED, scenario="freedoom2:MAP07,deathmatch"))


@pytest.mark.parametrize(("kinds", "frames"), [(2, 20_000), (13, 20_000), (18, 20_000), (2, 60_000), (3, 9)])
def test_splits_hold_fair_shares_of_all_scenarios(kinds: int, frames: int) -> None:
    recording = GameRecording(frames=frames, scenario=[f"s{kind:02d}" for kind in range(kinds)])
    lengths = recording.episode_lengths()
    assert sum(lengths) == frames
    assert max(lengths) - min(lengths) <= 1
    splits = recorder._splits(recording)
    assert sorted(name for names in splits.values() for name in names) == [
        recorder.episode_name(recording, number) for number in range(len(lengths))
    ]
    for names in splits.values():
        of = [name[15:] for name in names]
        assert {of.count(scenario) for scenario in recording.scenarios()} == {len(of) // kinds}
    if frames >= 2000 * kinds:  # enough for episodes of 100 frames, twenty of each
        assert 0.04 < len(splits["test"]) / len(lengths) < 0.06


def test_a_single_scenario_is_divided_as_it_always_was() -> None:
    for scenario in ("deathmatch", ["deathmatch"]):
        recording = GameRecording(scenario=scenario)
        splits = recorder._splits(recording)
        assert splits["validation"] == ["episode-000022", "episode-000032"]
        assert splits["test"] == ["episode-000001", "episode-000015"]
        assert len(splits["train"]) == 36
        assert recorder.describe_source(recording)["scenario"] == "deathmatch"


@pytest.mark.parametrize(("frames", "episodes"), [(4000, 8), (3500, 7), (30, 3)])
def test_a_recording_may_be_for_measuring_alone(frames: int, episodes: int) -> None:
    recording = GameRecording(frames=frames, held_out=0.5)
    splits = {split: len(names) for split, names in recorder._splits(recording).items()}
    assert splits == {"train": episodes % 2, "validation": episodes // 2, "test": episodes // 2}
    assert recorder.describe_source(recording)["held_out"] == 0.5
    # as in datasets recorded before there was a choice
    assert "held_out" not in recorder.describe_source(GameRecording())


@pytest.mark.parametrize("modalities", [("labels", "flow"), ("flow", "labels", "rgb", "flow")])
def test_modalities_are_described_as_they_always_were(modalities: tuple[str, ...]) -> None:
    recording = GameRecording(modalities=modalities)
    assert list(recorder.describe_modalities(recording)) == ["rgb", "flow", "labels", "controls"]
    flags = {name: value for name, value in recorder.describe_source(recording).items() if isinstance(value, bool)}
    assert flags == {"depth": False, "flow": True, "audio": False, "labels": True}  # also to continue older datasets


@pytest.mark.parametrize(("name", "tokens"), [("depht", ["did you mean 'depth'?"]), ("camera", ["flow", "labels"])])
def test_a_modality_that_the_game_does_not_have_is_refused(name: str, tokens: list[str], tmp_path: Path) -> None:
    with refused("game.modality", f"'{name}'", *tokens):
        record_game(str(tmp_path / "data"), GameRecording(frames=9, modalities=("flow", name)))
    assert not (tmp_path / "data" / INFO_NAME).exists()


def test_a_comma_in_a_path_separates_no_scenarios(tmp_path: Path) -> None:
    config = tmp_path / "one, two.cfg"
    config.touch()
    assert GameRecording(scenario=str(config)).scenarios() == [str(config)]


def test_a_killed_recording_continues_to_the_same_bytes(uninterrupted: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_until(lambda: any(tmp_path.glob("shard-*.tar")))
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert not (tmp_path / INDEX_NAME).exists()
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("shard-*.tar")}
    assert 0 < len(kept) < 3
    wait_until_gone(family)  # neither workers nor games are left
    record_game(str(tmp_path), replace(LONG, workers=1))
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept  # complete shards were not redone
    assert contents(tmp_path) == contents(uninterrupted)


def test_a_killed_worker_ends_the_recording_with_one_sentence(uninterrupted: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_until(lambda: are_recording(tmp_path))
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    family = psutil.Process(process.pid).children(recursive=True)
    workers[0].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "[worker.killed]" in errors
    assert not any(tmp_path.glob("*.partial"))
    wait_until_gone(family)
    record_game(str(tmp_path), replace(LONG, workers=1))
    assert contents(tmp_path) == contents(uninterrupted)


def test_other_parameters_are_refused_and_both_values_named(tmp_path: Path) -> None:
    record_game(str(tmp_path), SHORT)

    def changed() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.iterdir())}

    before = changed()
    with refused("dataset.other-settings", str(tmp_path), "seed 0", "now it is 1"):
        record_game(str(tmp_path), replace(SHORT, seed=1))
    record_game(str(tmp_path), replace(SHORT, workers=2))  # how many record makes no difference
    assert changed() == before  # not even the folder: it may be on a disk that is read-only


def test_a_full_disk_is_reported_and_nothing_half_written_is_kept(tmp_path: Path) -> None:
    (tmp_path / "shard-000001.tar.partial").symlink_to("/dev/full")  # every write fails as on a full disk
    with refused("dataset.unwritable", str(tmp_path), "No space left on device", "the same command"):
        record_game(str(tmp_path), replace(SHORT, workers=2))
    assert not any(tmp_path.glob("*.partial"))
    assert not (tmp_path / INDEX_NAME).exists()
    record_game(str(tmp_path), SHORT)
    assert ShardIndex.load(str(tmp_path)).episode_frames.tolist() == [10, 10, 10]


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused("dataset.unwritable", str(tmp_path / "file" / "dataset"), "Not a directory"):
        record_game(str(tmp_path / "file" / "dataset"), SHORT)


def test_two_recordings_do_not_write_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_game(str(tmp_path), SHORT)
    (tmp_path / INDEX_NAME).unlink()  # a recording that was killed
    monkeypatch.setattr(jobs, "LOCK_PATIENCE", 0.1)
    with open(tmp_path / INFO_NAME) as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        with refused("dataset.locked", str(tmp_path)):
            record_game(str(tmp_path), SHORT)


def test_a_second_recording_waits_for_the_first(uninterrupted: Path, tmp_path: Path) -> None:
    """As two trials of a sweep do, and two nodes of a cluster."""
    both = [start(tmp_path), start(tmp_path)]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("is being written by another process; waiting for it" in text for text in errors) == 1
    assert sum("recording:" in text for text in errors) == 1  # the other one found it finished
    assert contents(tmp_path) == contents(uninterrupted)


def test_impossible_parameters_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    root = tmp_path / "dataset"
    for wrong, code, *tokens in (
        ({"frames": 2}, "arguments.too-small", "frames is 2", "at least 3"),
        ({"workers": 0}, "arguments.too-small", "workers is 0"),
        ({"seed": -1}, "arguments.seed", "seed is -1"),
        ({"size": (16, 160)}, "arguments.size", "size is 16x160", "32"),
        ({"size": (2000, 4000)}, "game.size", "2000x4000", "1080x1920"),
        ({"scenario": "deathmach"}, "game.scenario", "'deathmach'", "did you mean 'deathmatch'?"),
        ({"scenario": "deathmatch,deathmach"}, "game.scenario", "'deathmach'"),
        ({"scenario": "deathmatch,"}, "game.scenario", "scenario ''"),
        ({"scenario": ["deathmatch", "freedoom2:MAP99"]}, "game.map", "freedoom2", "MAP99"),
        ({"scenario": []}, "arguments.empty", "scenario"),
        ({"held_out": 0.0}, "arguments.held-out", "held_out is 0.0", "0.5"),
        ({"held_out": 0.6}, "arguments.held-out", "held_out is 0.6", "0.5"),
        ({"scenario": "deathmatch,basic", "frames": 5}, "arguments.too-small", "frames is 5", "at least 6"),
    ):
        with refused(code, *tokens):
            record_game(str(root), replace(SHORT, **wrong))
    with refused("dataset.not-local", "memory://dataset"):
        record_game("memory://dataset", SHORT)
    assert not root.exists()


def test_an_interrupted_recording_stops_its_games(tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_until(lambda: are_recording(tmp_path))
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "owl: interrupted"
    assert "Traceback" not in errors
    wait_until_gone(family)
    assert not any(tmp_path.glob("*.partial"))


def test_neighbouring_frames_match_after_warping_by_the_flow(uninterrupted: Path) -> None:
    reader = DatasetReader(str(uninterrupted))
    better = 0
    for frame in range(100, 140):
        before, now = (reader.frame("rgb", 0, number).astype(np.float32) for number in (frame - 1, frame))
        flow = cv2.resize(reader.frame("flow", 0, frame), (80, 48))
        y, x = np.mgrid[:48, :80].astype(np.float32)
        warped = cv2.remap(
            before, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        better += np.abs(warped - now).mean() < np.abs(before - now).mean()
    assert better > 30
