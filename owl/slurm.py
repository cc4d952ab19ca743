"""SLURM jobs that save a checkpoint, requeue themselves and resume."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from owl.atomic import atomic_write
from owl.errors import OwlError

RUNNING_OUT = 138
"""Exit status after saving on SIGUSR1, which announces the time limit."""
SCRIPT = """\
#!/bin/bash
{directives}

{setup}# a preempted job gets SIGTERM: training saves a checkpoint, and neither this script nor srun may end before that
trap '' TERM

# if one process fails, end the others after the time that saving may take
srun --wait=300 {command}
status=$?

# {running_out}: training has saved a checkpoint before the time limit; requeue the job to resume
if [ "$status" -eq {running_out} ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
"""


@dataclass(frozen=True)
class Job:
    """Command and resources of a job.

    Args:
        name: Name in the queue.
        log: File for the output; ``%j`` is replaced by the job's number, ``%A`` and ``%a`` by those of an array.
        command: Arguments of ``python -m owl``; every task runs it.
        copies: Number of identical jobs in an array; None: a single job.
        nodes: Number of nodes.
        tasks_per_node: Processes per node.
        gpus_per_node: GPUs per node.
        cpus_per_task: Cores per task.
        time: Time limit, in sbatch's format.
        notice: Seconds before the limit at which the job receives SIGUSR1.
        setup: Shell command to run first.
        sbatch: Additional options of sbatch, ``name=value`` or ``name``, which take precedence.
    """

    name: str
    log: Path
    command: Sequence[str]
    copies: int | None = None
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 8
    time: str = "24:00:00"
    notice: int = 120
    setup: str | None = None
    sbatch: Sequence[str] = ()

    def script(self) -> str:
        """Return the job's script for sbatch, which requeues itself after its time limit and after preemption."""
        options = {
            "job-name": self.name,
            "array": self.copies and f"1-{self.copies}",
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks_per_node,
            "cpus-per-task": self.cpus_per_task,
            "gpus-per-node": self.gpus_per_node or None,
            "time": self.time,
            "signal": f"USR1@{self.notice}",
            "output": Path(str(self.log.parent).replace("%", "%%")) / self.log.name,
            "open-mode": "append",
        }
        given = [option.lstrip("-") for option in self.sbatch]
        replaced = {option.partition("=")[0] for option in given}
        lines = [f"{key}={value}" for key, value in options.items() if value is not None and key not in replaced]
        lines = [quoted(line) for line in [*lines, "requeue", *given]]
        return SCRIPT.format(
            directives="\n".join(f"#SBATCH --{line}" for line in lines),
            setup=f"{self.setup}\n" if self.setup else "",
            command=f"{shlex.quote(sys.executable)} -m owl {shlex.join(self.command)}",
            running_out=RUNNING_OUT,
        )


def quoted(option: str) -> str:
    """Quote the value of ``name=value`` for sbatch.

    Raises:
        OwlError: The value has more than one line, which sbatch does not support.
    """
    name, equals, value = option.partition("=")
    if not option.isprintable():
        raise OwlError(
            "slurm.line",
            f"sbatch's option {name} is {value!r}, expected one line of printable text; correct it",
        )
    if not re.fullmatch(r"[\w%@+:,./=-]*", value, re.ASCII):
        value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"{name}{equals}{value}"


def queue(job: Job, path: Path) -> None:
    """Write a job's script to ``path`` and submit it with sbatch.

    Raises:
        OwlError: sbatch is not installed, or rejects the job.
    """
    if shutil.which("sbatch") is None:
        raise OwlError("slurm.missing", "sbatch is not installed here; submit from a login node of a SLURM cluster")
    atomic_write(path, job.script())
    finished = subprocess.run(["sbatch", str(path)], capture_output=True, text=True)
    if finished.returncode:
        raise OwlError(
            "slurm.refused", f"sbatch rejected {path} ({' '.join(finished.stderr.split())}); correct it with --sbatch"
        )
    print(f"{finished.stdout.strip()}: {path}")
