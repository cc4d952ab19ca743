"""``data import`` as it is typed: the summary, the warnings, the refusals, and the how-to page from top to bottom."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from owl.__main__ import run
from owl.commands import data_import
from owl.data.shards import INFO_NAME
from tests.helpers.errors import refused
from tests.helpers.tiny import REPOSITORY
from tests.helpers.videos import RATE, make_recording, make_video
from tests.test_docs import commands


@pytest.fixture
def footage(tmp_path: Path) -> Path:
    """Three videos, one of them with sound, and one file that is no video."""
    make_video(tmp_path / "footage" / "a.mp4", 60, sound=48_000)
    make_video(tmp_path / "footage" / "nested" / "b [1].mkv", 50, rate=25, size=(96, 96))
    make_video(tmp_path / "footage" / "one.mp4", 1)
    (tmp_path / "footage" / "empty.mp4").touch()
    return tmp_path / "footage"


def test_it_reports_the_result_of_each_recording(
    footage: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    data = footage.parent / "data"
    assert run(["data", "import", str(footage), str(data), "--size", "24x32", "--fps", "15", "--audio", "false"]) == 0
    out, err = capsys.readouterr()
    for name in ("a.mp4", "nested/b [1].mkv", "one.mp4", "left out: the file is empty"):
        assert name in out
    assert "warning: empty.mp4 is left out: the file is empty" in err
    assert "61 frames, 4.1 s at 15 frames/s, 24x32, rgb" in out
    described = json.loads((data / INFO_NAME).read_text())
    assert (described["size"], described["fps"], described["source"]["kind"]) == ([24, 32], 15, "videos")


@pytest.mark.parametrize(("name", "value"), [("size", "large"), ("size", "0x32"), ("fps", 0), ("fps", float("nan"))])
def test_impossible_options_are_refused(footage: Path, name: str, value: Any) -> None:
    with refused(f"arguments.{name}", f"--{name} is ", str(value)):
        data_import.main(str(footage), str(footage.parent / "data"), **{name: value})
    assert not (footage.parent / "data").exists()


def test_every_command_of_the_page_on_own_footage_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("experiments", "configs"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    make_video(tmp_path / "footage" / "clip.mp4", 60, size=(96, 160), sound=48_000)
    make_recording(tmp_path / "recordings" / "first", [(5 / RATE, "KEYBOARD", [0x57, True])])
    shorter = (
        "--trainer.max_steps 1 --trainer.max_time null --data.init_args.batch_size 2 --data.init_args.num_workers 0"
    )
    shorter += " --data.init_args.validation_windows 2 --trainer.enable_progress_bar false"
    for command in commands(REPOSITORY / "docs" / "how-to" / "own-footage.md"):
        arguments = shlex.split(command)[3:]
        monkeypatch.setattr("sys.argv", ["owl", *arguments, *(shorter.split() if arguments[0] == "fit" else [])])
        assert run([*arguments, *(shorter.split() if arguments[0] == "fit" else [])]) == 0, command
    assert (tmp_path / "runs" / "mine" / "report.md").exists()
