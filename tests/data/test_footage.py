"""What a folder of footage holds: links, names of any bytes, files that cannot be read."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from owl.data.footage import find_footage
from owl.data.importer import import_footage
from owl.data.overview import DatasetReader
from owl.data.verification import verify_members
from tests.helpers.videos import make_recording, make_video

STRANGE = os.fsdecode(b"caf\xe9 \xf0\x9f\x8e\xae.mp4")  # not UTF-8


@pytest.fixture
def video(tmp_path: Path) -> bytes:
    path = make_video(tmp_path / "made.mp4", 4)
    content = path.read_bytes()
    path.unlink()
    return content


def names(root: Path) -> list[str]:
    return [recording.name for recording in find_footage(root, root / "data").recordings]


def test_each_video_is_found_once_whatever_links_lead_to_it(tmp_path: Path, video: bytes) -> None:
    root, elsewhere = tmp_path / "footage", tmp_path / "elsewhere"
    (root / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    (root / "a.mp4").write_bytes(video)
    (root / "sub" / "b.mp4").write_bytes(video)  # a copy is a video of its own
    (elsewhere / "c.mp4").write_bytes(video)
    (root / "sub" / "up").symlink_to("..")
    (root / "again").symlink_to("sub")
    (root / "0.mp4").symlink_to("a.mp4")
    os.link(root / "a.mp4", root / "sub" / "hard.mp4")
    (root / "other").symlink_to(elsewhere)
    (root / "other too").symlink_to(elsewhere)
    assert names(root) == ["a.mp4", "other/c.mp4", "sub/b.mp4"]
    (tmp_path / "door").symlink_to(root)
    assert names(tmp_path / "door") == ["a.mp4", "other/c.mp4", "sub/b.mp4"]


def test_broken_links_are_named_and_pipes_skipped(tmp_path: Path, video: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(video)
    (tmp_path / "gone.mp4").symlink_to("nothing.mp4")
    (tmp_path / "circle.mp4").symlink_to("circle.mp4")
    (tmp_path / "notes.txt").symlink_to("nothing.txt")
    os.mkfifo(tmp_path / "pipe.mp4")  # reading it would wait for ever
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(os.path.relpath(tmp_path / "door.mp4"))
        footage = find_footage(tmp_path, tmp_path / "data")
    assert [recording.name for recording in footage.recordings] == ["a.mp4"]
    assert list(footage.skipped) == ["circle.mp4", "gone.mp4"]


def test_recordings_of_a_linked_folder_are_found_once(tmp_path: Path) -> None:
    make_recording(tmp_path / "owl" / "one", [], frames=4)
    (tmp_path / "owl" / "two").symlink_to("one")
    assert names(tmp_path / "owl") == ["one"]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_names_of_any_bytes_are_imported_and_printed(tmp_path: Path, video: bytes, encoding: str) -> None:
    source = tmp_path / os.fsdecode(b"f\xf6r[mich] \xf0\x9f\x8e\xae")
    source.mkdir()
    for name in (STRANGE, "12:30:00.mp4", "🎮 [b].mp4"):
        (source / name).write_bytes(video)
    (source / ("x" + STRANGE)).touch()  # left out by name
    command = [sys.executable, "-m", "owl", "data"]
    options = {"capture_output": True, "cwd": source, "env": os.environ | {"PYTHONIOENCODING": encoding}}
    for arguments in (["import", ".", "../data [1]"], ["verify", "../data [1]"]):
        finished = subprocess.run([*command, *arguments], **options)  # type: ignore[call-overload]
        assert finished.returncode == 0, finished.stderr.decode(errors="replace")
        assert b"Traceback" not in finished.stderr
        if arguments[0] == "import":
            assert b"caf\\xe9 " in finished.stdout
            assert b"x" + b"caf\\xe9 " in finished.stderr
    description = (tmp_path / "data [1]" / "dataset.json").read_bytes().decode("utf-8")
    recordings = json.loads(description)["source"]["recordings"]
    assert list(recordings) == ["12:30:00.mp4", "caf\\xe9 🎮.mp4", "🎮 [b].mp4"]
    assert not any(verify_members(DatasetReader(str(tmp_path / "data [1]"))))


def test_a_dataset_may_lie_in_a_folder_that_is_not_utf8(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", 4)
    root = tmp_path / os.fsdecode(b"d\xe9")
    import_footage(tmp_path / "a.mp4", root)
    assert not any(verify_members(DatasetReader(str(root))))
