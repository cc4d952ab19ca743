"""What stands in for a cluster."""

from pathlib import Path

import pytest

from tests.helpers.tiny import REPOSITORY


def place(folder: Path, name: str, script: str) -> None:
    """Put a program on the path, in the place of one that only clusters have."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an experiment and what stands in for SLURM; what was called is written to ``calls``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "experiments").symlink_to(REPOSITORY / "experiments")
    for name in ("sbatch", "srun", "scontrol"):
        place(folder, name, f'echo "{name} $*" >> {tmp_path}/calls\nexit ${{{name.upper()}_STATUS:-0}}')
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.chdir(tmp_path)
    return tmp_path
