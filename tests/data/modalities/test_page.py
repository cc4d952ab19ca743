"""The page on adding a modality is followed to the letter, in a copy of the package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny import REPOSITORY, owl_here
from tests.test_docs import blocks, lines, shortened

PAGE = REPOSITORY / "docs" / "how-to" / "add-a-modality.md"


def change(file: Path, diff: str) -> None:
    """Insert the lines that a diff adds, each behind the one above it."""
    content, above = file.read_text(), ""
    for line in diff.splitlines():
        if line.startswith("+"):
            assert content.count(f"\n{above}\n") == 1
            content = content.replace(f"\n{above}\n", f"\n{above}\n{line[1:]}\n")
        above = line[1:]
    file.write_text(content)


FOLLOW = """
import json, runpy, sys
from pathlib import Path
from owl.data import jobs, recorder
from tests.helpers.tiny import owl_here
recorder.run = lambda job, root, workers: jobs.run(job, root)  # in this process, as in recorded_here
for kind, content in json.loads(sys.argv[1]):
    if kind == "command":
        assert owl_here(*content, cwd=Path.cwd()) == 0, content
    elif kind == "script":
        runpy.run_path(content, run_name="__main__")
    else:
        exec(content, {})
"""


def follow(steps: list[tuple[str, str | list[str]]], folder: Path) -> str:
    """Take steps of a page with the copy of owl in ``folder``, in one process; returns what they printed."""
    path = os.environ | {"PYTHONPATH": str(REPOSITORY)}  # for tests.helpers; owl is found in the folder first
    command = [sys.executable, "-c", FOLLOW, json.dumps(steps)]
    done = subprocess.run(command, cwd=folder, env=path, capture_output=True, text=True)
    assert done.returncode == 0, f"{steps}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.usefixtures("recorded_here")
def test_a_new_modality_is_three_files_recorded_or_not(tmp_path: Path) -> None:
    recorded, *page = blocks(PAGE)
    (command,) = lines(recorded.content)
    assert owl_here(*shortened(command), cwd=tmp_path) == 0
    shutil.copytree(REPOSITORY / "owl", tmp_path / "owl", ignore=shutil.ignore_patterns("__pycache__"))
    steps: list[tuple[str, str | list[str]]] = []
    for block in page:
        if block.language == "diff":
            change(tmp_path / block.title, block.content)
        elif block.title:
            assert not (tmp_path / block.title).exists()
            (tmp_path / block.title).write_text(block.content)
        elif block.language == "python":
            steps.append(("python", block.content))
        else:
            for command in lines(block.content):
                python, *arguments = command.split()
                assert python == "python"
                is_owl = arguments[:2] == ["-m", "owl"]
                steps.append(("command", shortened(command)) if is_owl else ("script", *arguments))
    titles = [block.title for block in page if block.title]
    assert [Path(title).name for title in titles] == [
        *("travel.py", "__init__.py", "add_travel.py"),
        *("speed.py", "__init__.py", "data_record.py"),
    ]
    assert len(steps) == 7
    assert "unit map units" in follow(steps, tmp_path)  # inspect's table
    assert (tmp_path / "arena-travel-contact-sheet.png").exists()
