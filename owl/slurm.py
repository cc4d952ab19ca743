"""Jobs of a SLURM cluster that save, queue again and go on: their script, and how it gets into the queue."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from owl.atomic import atomic_write
from owl.errors import OwlError

RUNNING_OUT = 138
"""Exit status of what has saved because SIGUSR1 announced the end of its time."""


def write_script(header: dict[str, object], sbatch: Sequence[str], setup: str | None, command: Sequence[str]) -> str:
    """A job as a readable script.

    Args:
        header: Options of sbatch and their values; None: the option has none. Those that bring a job back are added.
        sbatch: More of them, ``name=value`` or ``name``, which win.
        setup: Line of shell before the command.
        command: Of owl, without ``python -m owl``; each task of the job runs it.
    """
    given = [option.lstrip("-") for option in sbatch]
    replaced = {option.partition("=")[0] for option in given}
    options = header | {"requeue": None, "open-mode": "append"}
    lines = [f"{key}" if value is None else f"{key}={value}" for key, value in options.items() if key not in replaced]
    directives = "\n".join(f"#SBATCH --{line}" for line in [*lines, *given])
    return (
        f"#!/bin/bash\n"
        f"{directives}\n\n"
        + (f"{setup}\n" if setup else "")
        + "# a preempted job gets SIGTERM: training answers it, and neither this script nor srun may end before that\n"
        + "trap '' TERM\n\n"
        + f"# a process that fails takes the others with it, after the time that a save may take\n"
        f"srun --wait=300 {shlex.quote(sys.executable)} -m owl {shlex.join(command)}\n"
        f"status=$?\n\n"
        f"# {RUNNING_OUT}: training was told that time runs out and has saved; queue again and go on from there\n"
        f'if [ "$status" -eq {RUNNING_OUT} ]; then scontrol requeue "$SLURM_JOB_ID"; fi\n'
        f'exit "$status"\n'
    )


def queue(path: Path, script: str) -> None:
    """Write a job's script and hand it to sbatch.

    Raises:
        OwlError: There is no sbatch, or it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise OwlError("there is no sbatch here, a login node of a SLURM cluster was expected; submit from there")
    atomic_write(path, script)
    finished = subprocess.run(["sbatch", str(path)], capture_output=True, text=True)
    if finished.returncode:
        raise OwlError(f"sbatch refused {path} ({' '.join(finished.stderr.split())}); correct it with --sbatch")
    print(f"{finished.stdout.strip()}: {path}")
