"""``python -m owl submit``: run an experiment as a SLURM job that saves, requeues itself and resumes."""

import re
from pathlib import Path
from shlex import quote

from owl.errors import OwlError, at_least
from owl.slurm import Job, queue

TIME = r"(\d+-)?\d{1,3}(:\d{2}){0,2}"
"""Formats of sbatch: minutes, minutes:seconds, hours:minutes:seconds, or days- before any of these."""


def main(
    *,
    config: list[str],
    nodes: int = 1,
    gpus_per_node: int = 1,
    cpus_per_task: int = 8,
    time: str = "24:00:00",
    notice: int = 120,
    name: str | None = None,
    runs: str = "runs",
    setup: str | None = None,
    sbatch: list[str] = [],  # noqa: B006 (never changed; a tuple would be another command line)
    dry_run: bool = False,
    options: list[str] = [],  # noqa: B006
) -> None:
    """Submit an experiment to SLURM, as a job that is resumed after its time limit and after preemption.

    An sbatch script is written to runs/<name>/submit.sh and submitted. Before the time limit fit saves a checkpoint and
    the job requeues itself; a preempted job is requeued by SLURM. Both resume exactly.

    Args:
        config: The experiment's YAML, as for fit; repeatable, later files take precedence.
        nodes: Number of nodes.
        gpus_per_node: GPUs per node, with one process per GPU; 0: one process per node, on its CPU.
        cpus_per_task: Cores per process, for its threads and its dataloader workers.
        time: Time limit of the job, in sbatch's format; a longer training is requeued until it is complete.
        notice: Seconds before the limit at which to save; more than the longest step or validation batch takes.
        name: Name of the run; default: the file name of the last config.
        runs: Folder of the run folders; all nodes must share it.
        setup: Shell command to run before training, e.g. "module load cuda".
        sbatch: Additional options of sbatch: --sbatch partition=gpu account=lab.
        dry_run: Print the script; write and submit nothing.
        options: Options of fit, given without this name: --trainer.max_steps 500.
    """
    at_least(1, nodes=nodes, cpus_per_task=cpus_per_task, notice=notice)
    at_least(0, gpus_per_node=gpus_per_node)
    if not re.fullmatch(TIME, time):
        raise OwlError(
            "submit.time", f'time is "{time}", expected minutes, hours:minutes:seconds or days-hours:minutes:seconds'
        )
    missing = [file for file in config if not Path(file).is_file()]
    if missing:
        raise OwlError(
            "submit.config", f"the file {missing[0]} does not exist; give the experiment's YAML with --config"
        )
    name = name or Path(config[-1]).stem
    folder = Path(runs) / name
    fit = [
        "fit",
        *(word for file in config for word in ("--config", file)),
        *("--name", name, "--runs", runs, "--ckpt_path", "last"),
        *("--trainer.num_nodes", str(nodes), "--trainer.devices", str(max(1, gpus_per_node))),
        *("--trainer.accelerator", "gpu" if gpus_per_node else "cpu"),
        *options,
    ]
    job = Job(
        name=name,
        log=folder / "slurm-%j.log",
        command=fit,
        nodes=nodes,
        tasks_per_node=max(1, gpus_per_node),
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        time=time,
        notice=notice,
        setup=setup,
        sbatch=sbatch,
    )
    if dry_run:
        print(job.script(), end="")
        return
    queue(job, folder / "submit.sh")
    print(f"Follow it: tail -F {quote(str(folder))}/slurm-*.log   TensorBoard: tensorboard --logdir {quote(runs)}")
