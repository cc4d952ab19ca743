"""Jobs of a SLURM cluster that save, queue again and go on: their script, and how it gets into the queue."""

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
"""Exit status of what has saved because SIGUSR1 announced the end of its time."""
SCRIPT = """\
#!/bin/bash
{directives}

{setup}# a preempted job gets SIGTERM: training answers it, and neither this script nor srun may end before that
trap '' TERM

# a process that fails takes the others with it, after the time that a save may take
srun --wait=300 {command}
status=$?

# {running_out}: training was told that time runs out and has saved; queue again and go on from there
if [ "$status" -eq {running_out} ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
"""


@dataclass(frozen=True)
class Job:
    """What a job runs, and what it needs.

    Args:
        name: As the queue lists it.
        log: File that gets what it prints; in its name ``%j`` is its number, ``%A`` and ``%a`` those of an array.
        command: Of owl, without ``python -m owl``; each task runs it.
        copies: Jobs that do the same beside each other; None: one job that is not numbered.
        nodes: Machines.
        tasks_per_node: Processes on each.
        gpus_per_node: GPUs of each.
        cpus_per_task: Cores of each task.
        time: Limit of one stay in the queue, as sbatch takes it.
        notice: Seconds before the limit at which the job is told to save.
        setup: Line of shell before the command.
        sbatch: More options of sbatch, ``name=value`` or ``name``, which win.
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
        """The job as a readable script for sbatch, which comes back after its time limit and after preemption."""
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
    """Write ``name=value`` so that sbatch takes the value as it is.

    Raises:
        OwlError: It has more than one line, which sbatch has no way to write.
    """
    name, equals, value = option.partition("=")
    if not option.isprintable():
        raise OwlError(
            "slurm.line",
            f"sbatch's option {name} is {value!r}, one line of text was expected; leave out what cannot be printed",
        )
    if not re.fullmatch(r"[\w%@+:,./=-]*", value, re.ASCII):
        value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"{name}{equals}{value}"


def queue(job: Job, path: Path) -> None:
    """Write a job's script to ``path`` and hand it to sbatch.

    Raises:
        OwlError: There is no sbatch, or it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise OwlError(
            "slurm.missing", "there is no sbatch here, a login node of a SLURM cluster was expected; submit from there"
        )
    atomic_write(path, job.script())
    finished = subprocess.run(["sbatch", str(path)], capture_output=True, text=True)
    if finished.returncode:
        raise OwlError(
            "slurm.refused", f"sbatch refused {path} ({' '.join(finished.stderr.split())}); correct it with --sbatch"
        )
    print(f"{finished.stdout.strip()}: {path}")
