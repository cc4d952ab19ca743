"""``python -m owl sweep``: search the settings of an experiment in parallel; report the best and key importances."""

import functools
import multiprocessing
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Literal

from owl.cli import mistakes
from owl.cli.mistakes import Setting
from owl.configuration import check_file
from owl.errors import OwlError, at_least
from owl.slurm import Job, queue
from owl.sweep.plan import Plan
from owl.sweep.plan import options as as_options
from owl.sweep.report import write_report
from owl.sweep.study import SweepStudy, network_of, open_storage
from owl.sweep.workers import Workers

DATABASE = "sweep.db"


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
    """Search the settings of an experiment in parallel, and report the best setting and the importance of keys.

    Each trial is a run of fit in a separate process, in runs/<sweep>/trial-<number>: a trial that crashes or runs out
    of memory is recorded as failed, and the others continue. The folder runs/<sweep> gets report.md with pictures, and
    best.yaml, a configuration for fit. docs/how-to/sweep.md explains every key of the sweep's YAML.

    Args:
        config: The experiment's YAML, as for fit; repeatable, later files win.
        sweep: The sweep's YAML, such as {objective: val/psnr, direction: maximize, trials: 20, sampler: tpe, pruner:
            median, space: {model.init_args.optimizer.init_args.lr: {low: 1.0e-4, high: 1.0e-2, log: true}}}. Stopped,
            killed, or another machine at hand? The same command again continues the sweep, or adds workers to it.
        workers: Number of parallel trials on this machine; Ctrl-C stops them with a checkpoint to continue from.
        threads_per_trial: OpenMP threads per trial; by default the number of cores.
        trials: Overrides the number in the YAML, for all workers together; 0 only rewrites the report.
        runs: Folder of the run folders; all machines that share a sweep must share it.
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
    database = (folder / DATABASE).absolute()
    url = plan.storage or f"sqlite:///{database}"
    command = ["sweep", *(word for file in config for word in ("--config", file)), "--sweep", sweep]
    command += ["--runs", runs] if runs != "runs" else []
    again = shlex.join(["python", "-m", "owl", *command, *options])
    is_new = plan.storage is None and not database.exists()
    if trials == 0:
        with suppress(KeyError):
            if not is_new:
                return conclude(SweepStudy(open_storage(url), plan), Path(runs), again)
        raise OwlError(
            "sweep.missing", f"there is no sweep '{plan.name}' in {url} yet to report; begin it without --trials 0"
        )
    if plan.storage is None:
        refuse_network(folder, executor)
    arguments = [*(f"--config={file}" for file in config), *options]

    @functools.cache
    def check_once() -> None:
        # apart, so that this process stays small: it may live for days beside the trials
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            apart.submit(check, plan, sweep, arguments).result()

    if is_new:
        check_once()  # before anything is written
        folder.mkdir(parents=True, exist_ok=True)
    experiment = [*(Path(file).name for file in config), *options]
    study = SweepStudy.begin(open_storage(url), plan, experiment, check_once)
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
    report = functools.partial(write_report, study, Path(runs), again)
    crew = Workers(study, Path(runs), arguments, workers, threads_per_trial, url, report)
    try:
        crew.run()
    finally:
        conclude(study, Path(runs), again)
    return 128 + crew.signal if crew.signal else 0


def load_plan(path: str | Path, trials: int | None = None) -> Plan:
    """Read a sweep's YAML, whose keys are the arguments of `Plan`; the name defaults to that of the file.

    Args:
        path: The file.
        trials: Overrides the number of trials in the file.

    Raises:
        OwlError: The file is missing, or has an invalid key or value.
    """
    if not Path(path).is_file():
        raise OwlError("arguments.missing-file", f"there is no file {str(path)!r}; give a sweep's YAML with --sweep")
    check_file(str(path))
    given = {"name": Setting(str(path), Path(path).stem), **mistakes.read(Path(path)).value}
    given |= {"trials": Setting("option --trials", trials)} if trials else {}
    return mistakes.build(Plan, Setting(str(path), given))


def refuse_network(folder: Path, executor: str) -> None:
    """Check that SQLite is not used by several machines on a network file system; for one machine, print a note.

    Raises:
        OwlError: The workers are jobs of a cluster.
    """
    if kind := network_of(folder):
        found = f"{folder} is on a network file system ({kind}), where SQLite's locks may not hold between machines"
        advice = "set storage in the sweep's YAML: a URL of PostgreSQL or MySQL, or of a SQLite file where they do"
        if executor == "slurm":
            raise OwlError("sweep.network", f"{found}; {advice}")
        print(f"Note: {found}. To share this sweep with other machines, {advice}.")


def conclude(study: SweepStudy, runs: Path, again: str) -> int:
    """Write the report and print the result; ``again`` is the command that continues the sweep."""
    write_report(study, runs, again)
    folder, best = runs / study.plan.name, study.best()
    if best is not None:
        drawn = ", ".join(f"{key} {value}" for key, value in best.params.items())
        print(f"Best: {study.plan.objective} {best.value:.4g} with {drawn}")
        print(f"Train with it: python -m owl fit --config {folder / 'best.yaml'}")
    print(f"Report: {folder / 'report.md'}")
    return 0


def check(plan: Plan, path: str, arguments: list[str]) -> None:
    """Parse the experiment as fit does, with every choice and both ends of every range.

    Args:
        plan: The sweep.
        path: Its file.
        arguments: Arguments of fit for the experiment.

    Raises:
        OwlError: A key or a value in the experiment or in the space is invalid.
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
            key = next((key for key in setting if str(error).startswith(f"option --{key} ")), None)
            message = str(error).replace(f"option --{key}", f"{path}: key 'space.{key}'", 1)
            raise OwlError("sweep.setting", message) from error
        finally:
            sys.argv = before
