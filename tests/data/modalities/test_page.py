"""The page on adding a modality is followed to the letter, in a copy of the package."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.tiny import REPOSITORY
from tests.test_docs import Block, blocks, lines, shortened

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


def test_a_new_modality_is_three_files(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "owl", tmp_path / "owl", ignore=shutil.ignore_patterns("__pycache__"))

    printed = []

    def execute(*command: str) -> None:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        printed.append(done.stdout)

    def follow(block: Block) -> None:
        if block.language == "diff":
            change(tmp_path / block.title, block.content)
        elif block.title:
            assert not (tmp_path / block.title).exists()
            (tmp_path / block.title).write_text(block.content)
        elif block.language == "python":
            execute(sys.executable, "-c", block.content)
        else:
            for command in lines(block.content):
                python, *arguments = command.split()
                assert python == "python"
                options = shortened(command) if arguments[:2] == ["-m", "owl"] else []
                execute(sys.executable, *(["-m", "owl", *options] if options else arguments))

    page = blocks(PAGE)
    assert len({block.title for block in page if block.title}) <= 3
    for block in page:
        follow(block)
    assert (tmp_path / "arena-travel-contact-sheet.png").exists()
    assert any("unit map units" in text for text in printed)  # inspect's table
