"""``python -m owl sweep``: try settings of an experiment, in parallel, and say which is best and what mattered."""

import functools
import multiprocessing
import re
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Literal

from owl.cli.arguments import spoken
from owl.errors import OwlError, at_least
from owl.slurm import Job, queue
from owl.sweep.plan import Plan
from owl.sweep.plan import options as as_options
from owl.sweep.reading import load_plan
from owl.sweep.report import write_report
from owl.sweep.study import SweepStudy, is_url, open_storage, storage_address
from owl.sweep.workers import Workers


def main(
    *,
    config: list[str],
    sweep: str,
    workers: int = 1,
    threads_per_trial: int | None = None,
    trials: int | None = None,
    runs: str = "runs",
    executor: Literal["local", "slurm"] = "local",
    gpus_per_worker: int = 1,
    setup: str | None = None,
    sbatch: list[str] = [],  # noqa: B006 (never changed; a tuple would be another command line)
    options: list[str] = [],  # noqa: B006
) -> int:
    """Try settings of an experiment in parallel, find the best one, and report which keys mattered.

    Each trial is a run of fit in a process of its own, in runs/<sweep>/trial-<number>: one that crashes or runs out of
    memory is recorded as failed, and the others go on. The folder runs/<sweep> gets report.md with pictures, and
    best.yaml, which fit takes. docs/how-to/sweep.md explains every key of the sweep's YAML.

    Args:
        config: The experiment's YAML, as for fit; repeatable, later files win.
        sweep: The sweep's YAML, such as {objective: val/psnr, direction: maximize, trials: 20, sampler: tpe, pruner:
            median, space: {model.init_args.optimizer.init_args.lr: {low: 1.0e-4, high: 1.0e-2, log: true}}}. Stopped,
            killed, or another machine at hand? The same command again continues the sweep, or adds workers to it.
        workers: Trials that run at a time on this machine; Ctrl-C stops them with a checkpoint to continue from.
        threads_per_trial: OpenMP threads of each; where left out, as many as there are cores.
        trials: Replaces the number in the YAML, for all workers together; 0 only writes the report anew.
        runs: Folder that holds the run folders; all machines that share a sweep must share it.
        executor: Where the workers are: on this machine, or slurm: each a job of a cluster, which comes back after
            its time limit and after preemption until the sweep is done. Their script is runs/<sweep>/workers.sh.
        gpus_per_worker: GPUs of each job of slurm.
        setup: Line of shell before each job's worker, e.g. "module load cuda".
        sbatch: Further options of sbatch: --sbatch partition=gpu time=12:00:00 cpus-per-task=4.
        options: Of fit, for every trial. Written as fit takes them, without this name: --trainer.max_steps 500.
    """
    at_least(1, workers=workers, threads_per_trial=threads_per_trial)
    at_least(0, gpus_per_worker=gpus_per_worker)
    if executor == "local" and (setup or sbatch):
        raise OwlError(
            "sweep.cluster-option",
            "setup and sbatch are given, but only jobs of a cluster have them; add --executor slurm",
        )
    plan = load_plan(sweep, trials or None)
    folder = Path(runs) / plan.name
    address = storage_address(plan, folder)
    command = ["sweep", *(word for file in config for word in ("--config", file)), "--sweep", sweep]
    command += ["--runs", runs] if runs != "runs" else []
    again = shlex.join(["python", "-m", "owl", *command, *options])
    if trials == 0:
        conclude(existing(plan, address), plan, Path(runs), again)
        return 0
    arguments = [*(f"--config={file}" for file in config), *options]

    @functools.cache
    def check_once() -> None:
        # apart, so that this process stays small: it may live for days beside the trials
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            apart.submit(check, plan, sweep, arguments).result()

    if not is_url(address) and not Path(address).exists():
        check_once()  # before anything is written
    experiment = [*(Path(file).name for file in config), *options]
    study = SweepStudy.begin(open_storage(address), plan, experiment, check_once)
    if executor == "slurm":
        own = {"--threads_per_trial": threads_per_trial, "--trials": trials}
        command += [word for key, value in own.items() if value is not None for word in (key, str(value))]
        job = Job(
            name=plan.name,
            log=folder / "slurm-%A-%a.log",
            command=[*command, *options],
            copies=workers,
            gpus_per_node=gpus_per_worker,
            setup=setup,
            sbatch=sbatch,
        )
        queue(job, folder / "workers.sh")
        print(f"Follow them: tail -F {folder}/slurm-*.log   Report: the same command with --trials 0")
        return 0

    def report() -> None:
        write_report(study, plan, Path(runs), again)

    crew = Workers(study, plan, Path(runs), arguments, workers, threads_per_trial, address, report)
    try:
        crew.run()
    finally:
        conclude(study, plan, Path(runs), again)
    return 128 + crew.signal if crew.signal else 0


def conclude(study: SweepStudy, plan: Plan, runs: Path, again: str) -> None:
    """Write the report and say what came out.

    Args:
        study: The sweep's trials.
        plan: The sweep.
        runs: Folder that holds the run folders.
        again: The command that continues the sweep.
    """
    write_report(study, plan, runs, again)
    folder = runs / plan.name
    best = study.best()
    if best is not None:
        drawn = ", ".join(f"{key} {value}" for key, value in best.params.items())
        print(f"Best: {plan.objective} {best.value:.4g} with {drawn}")
        print(f"Train with it: python -m owl fit --config {folder / 'best.yaml'}")
    print(f"Report: {folder / 'report.md'}")


def existing(plan: Plan, address: str) -> SweepStudy:
    """Open a sweep's study to report it.

    Raises:
        OwlError: There is none.
    """
    if is_url(address) or Path(address).exists():
        try:
            return SweepStudy(open_storage(address), plan.name)
        except KeyError:
            pass
    raise OwlError(
        "sweep.missing", f"there is no sweep '{plan.name}' in {address} yet to report; begin it without --trials 0"
    )


def check(plan: Plan, path: str, arguments: list[str]) -> None:
    """Let fit read the experiment with every choice and both ends of every range.

    Args:
        plan: The sweep.
        path: Its file.
        arguments: Of fit: the experiment.

    Raises:
        OwlError: Something in the experiment, or in the space, is not accepted.
    """
    from owl.cli.lightning import main as fit  # takes seconds and hundreds of megabytes

    before = sys.argv
    for setting in plan.probes():
        sys.argv = ["owl", "fit", *arguments, *as_options(setting), "--print_config"]
        try:
            with redirect_stdout(StringIO()):
                fit(sys.argv[1:])
        except SystemExit as exit_:
            if exit_.code:
                raise
        except OwlError as error:
            raise OwlError("sweep.setting", in_terms_of(path, list(setting), str(error))) from error
        finally:
            sys.argv = before


def in_terms_of(path: str, keys: list[str], message: str) -> str:
    """Say of an option that a sweep sets where it comes from.

    Args:
        path: The sweep's file.
        keys: Of its space.
        message: What fit said.
    """
    found = re.match(r"option --([\w.]+) ", message)
    if found is None:
        return message
    option = found.group(1)  # jsonargparse may leave out init_args, or everything but the end
    meant = [key for key in keys if option in (key, spoken(key))]
    meant = meant or [key for key in keys if spoken(key).endswith(f".{option}")]
    return f"{path}: key 'space.{meant[0]}' {message[found.end() :]}" if len(meant) == 1 else message
