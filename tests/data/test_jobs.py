"""Shard jobs: the same bytes from one process or several and however they were killed; failures are reported."""

import fcntl
import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from owl.data import jobs
from owl.data.jobs import Made, local_folder, run
from owl.data.overview import DatasetReader
from owl.data.shards import INDEX_NAME, INFO_NAME, DatasetInfo, ShardIndex, shard_name
from tests.helpers.counting import EPISODES, FRAMES, SHARDS, Counting, Unloadable, diverge, kill_parent
from tests.helpers.errors import refused
from tests.helpers.processes import living
from tests.helpers.tiny import in_child


def contents(root: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in root.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What Counting writes undisturbed."""
    root = tmp_path_factory.mktemp("jobs")
    run(Counting(), root)
    return contents(root)


def test_a_finished_dataset_holds_every_frame_in_its_place(tmp_path: Path) -> None:
    info = run(Counting(), tmp_path)
    reader = DatasetReader(str(tmp_path))
    assert info == reader.info
    assert info.modalities["controls"]["frames"] == SHARDS * EPISODES * FRAMES
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [INFO_NAME, INDEX_NAME, *map(shard_name, range(SHARDS))]
    )
    for episode in range(SHARDS * EPISODES):
        for frame in range(FRAMES):
            assert reader.frame("controls", episode, frame).tolist() == [0, episode // EPISODES, episode, frame, 0]


def test_several_processes_write_the_same_bytes(tmp_path: Path, whole: dict[str, bytes], capfd: Any) -> None:
    run(Counting(), tmp_path, workers=2)
    assert contents(tmp_path) == whole
    assert f"{SHARDS * EPISODES * FRAMES}/{SHARDS * EPISODES * FRAMES}" in capfd.readouterr().err  # the bar's frames


@pytest.mark.parametrize("at", ["e0", "e3", "e7"])
def test_killed_and_continued_it_ends_with_the_same_bytes(tmp_path: Path, whole: dict[str, bytes], at: str) -> None:
    def killed() -> int:
        run(Counting(at=at), tmp_path)
        return 0

    assert in_child(killed) == -signal.SIGKILL
    assert not (tmp_path / INDEX_NAME).exists()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert len(kept) == int(at[1:]) // EPISODES
    run(Counting(), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(tmp_path) == whole


def test_a_killed_worker_is_reported_and_the_others_end(tmp_path: Path, whole: dict[str, bytes]) -> None:
    before = set(psutil.Process().children())  # such as the resource tracker that another test has started
    with refused("worker.killed", str(tmp_path), "run the same command again"):
        run(Counting(at="e5"), tmp_path, workers=2)
    assert not living(set(psutil.Process().children()) - before)
    assert not any(tmp_path.glob("*.partial"))
    run(Counting(), tmp_path)
    assert contents(tmp_path) == whole


def test_workers_end_with_their_parent_and_the_next_run_waits_for_them(tmp_path: Path, whole: dict[str, bytes]) -> None:
    def killed() -> int:
        run(Counting(at="e3", happens=kill_parent), tmp_path, workers=2)
        return 0

    assert in_child(killed) == -signal.SIGKILL
    run(Counting(), tmp_path)  # refused with dataset.locked if the workers lived on
    assert contents(tmp_path) == whole


def test_what_goes_wrong_in_a_worker_is_raised_and_its_shard_discarded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it diverged"):
        run(Counting(at="e1", happens=diverge), tmp_path, workers=1)
    left = {path.name for path in tmp_path.iterdir()}
    assert not left & {shard_name(0), f"{shard_name(0)}.partial", INDEX_NAME}


def test_a_job_that_cannot_be_loaded_in_a_worker_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no job"):
        run(Unloadable(), tmp_path, workers=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_warnings_reach_the_caller_and_the_bar_its_end(tmp_path: Path, workers: int, capfd: Any) -> None:
    with pytest.warns(UserWarning, match="e2 ends before frame 2") as caught:
        run(Counting(damaged="e2"), tmp_path, workers=workers)
    assert len(caught) == 1
    assert ShardIndex.load(tmp_path).episode_frames.tolist() == [5, 5, 2, 5, 5, 5, 5, 5]
    assert "40/40" in capfd.readouterr().err


def test_other_settings_and_other_datasets_are_refused_untouched(tmp_path: Path) -> None:
    run(Counting(), tmp_path / "a")
    before = contents(tmp_path / "a")
    with refused("dataset.other-settings", str(tmp_path / "a"), "seed 0", "now it is 1"):
        run(Counting(seed=1), tmp_path / "a")
    description = json.loads(before[INFO_NAME])
    description["source"]["kind"] = "found"
    (tmp_path / "a" / INFO_NAME).write_text(json.dumps(description))
    with refused("dataset.occupied", str(tmp_path / "a"), "found", "counted"):
        run(Counting(), tmp_path / "a")
    (tmp_path / "a" / INFO_NAME).unlink()
    with refused("dataset.occupied", str(tmp_path / "a"), INFO_NAME):
        run(Counting(), tmp_path / "a")
    assert contents(tmp_path / "a") == {name: content for name, content in before.items() if name != INFO_NAME}


def test_a_finished_dataset_is_left_as_it_is_on_a_disk_that_is_read_only(tmp_path: Path) -> None:
    run(Counting(), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.iterdir())}
    with open(tmp_path / INFO_NAME) as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # no lock is asked for
        run(Counting(), tmp_path, workers=2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.iterdir())} == before


def test_what_is_missing_of_a_finished_dataset_is_made_again(tmp_path: Path, whole: dict[str, bytes]) -> None:
    run(Counting(), tmp_path)
    (tmp_path / shard_name(2)).unlink()
    run(Counting(), tmp_path)
    assert contents(tmp_path) == whole
    info = DatasetInfo.load(tmp_path)
    del info.modalities["controls"]["frames"]
    info.save(tmp_path)  # killed before it was described, and then repaired
    run(Counting(), tmp_path)
    assert contents(tmp_path) == whole


def test_a_folder_that_others_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LOCK_PATIENCE", 0.1)
    Counting().info.save(tmp_path)
    with open(tmp_path / INFO_NAME) as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        with refused("dataset.locked", str(tmp_path)):
            run(Counting(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [INFO_NAME]


def test_only_local_folders_are_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused("dataset.not-local", "memory://data"):
        local_folder("memory://data")
    with refused("dataset.not-a-folder", str(tmp_path / "file")):
        local_folder(tmp_path / "file")
    with refused("dataset.unwritable", str(tmp_path / "file" / "data"), "Not a directory"):
        run(Counting(), local_folder(tmp_path / "file" / "data"))


def test_what_was_made_is_distinguished_by_content_alone() -> None:
    assert Made("12ab", "runs/a") == Made("12ab", "exports/a") != Made("34cd", "runs/a")
    assert str(Made("12ab", "runs/a")) == "runs/a (12ab)"
