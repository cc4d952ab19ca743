"""``python -m owl sweep``: search the settings of an experiment in parallel; report the best and key importances."""

import asyncio
import multiprocessing
import shlex
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from owl.cli import mistakes
from owl.cli.arguments import changed
from owl.cli.mistakes import Setting
from owl.configuration import check_file
from owl.data.storage import network_of
from owl.errors import OwlError, at_least
from owl.slurm import Job, queue
from owl.sweep.plan import Plan
from owl.sweep.plan import options as as_options
from owl.sweep.report import write_report
from owl.sweep.study import SweepStudy, open_storage
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
    """Search the settings of an experiment in parallel, and report the best setting and the importance of keys.

    Each trial is a run of fit in a separate process, in runs/<sweep>/trial-<number>: a trial that crashes or runs out
    of memory is recorded as failed, and the others continue. The folder runs/<sweep> gets report.md with pictures, and
    best.yaml, a configuration for fit. docs/how-to/sweep.md explains every key of the sweep's YAML.

    Args:
        config: The experiment's YAML, as for fit; repeatable, later files win.
        sweep: The sweep's YAML, such as {objective: val/psnr, direction: maximize, trials: 20, space: {KEY: {low: 0.1,
            high: 10.0, log: true}}}. The same command again continues a sweep, or adds workers to it.
        workers: Number of parallel trials on this machine; Ctrl-C stops them with a checkpoint to continue from.
        threads_per_trial: OpenMP threads per trial; by default the number of cores.
        trials: Overrides the number in the YAML, for all workers together; 0 only rewrites the report.
        runs: Folder of the run folders; all machines that share a sweep must share it.
        executor: Where the workers are: on this machine, or slurm: each a job of a cluster (runs/<sweep>/workers.sh),
            which is requeued after its time limit and after preemption until the sweep is done.
        gpus_per_worker: GPUs of each job of slurm.
        setup: Line of shell before each job's worker, e.g. "module load cuda".
        sbatch: Further options of sbatch: --sbatch partition=gpu time=12:00:00 cpus-per-task=4.
        options: Of fit, for every trial. Written as fit takes them, without this name: --trainer.max_steps 500.
    """
    at_least(1, workers=workers, threads_per_trial=threads_per_trial)
    at_least(0, gpus_per_worker=gpus_per_worker)
    if executor == "local" and (setup or sbatch):
        message = "setup and sbatch are given, but only jobs of a cluster have them; add --executor slurm"
        raise OwlError("sweep.cluster-option", message)
    plan = load_plan(sweep, trials or None)
    folder, files = Path(runs) / plan.name, [word for file in config for word in ("--config", file)]
    database = (folder / "sweep.db").absolute()
    url = plan.storage or f"sqlite:///{database}"
    own: dict[str, Any] = {"runs": runs, "threads_per_trial": threads_per_trial, "trials": trials or None}
    words = [word for name in changed(main, own) for word in (f"--{name}", str(own[name]))]
    command = ["sweep", *files, "--sweep", sweep, *words, *options]
    report = partial(write_report, runs=Path(runs), command=shlex.join(["python", "-m", "owl", *command]))
    if trials == 0:
        with suppress(KeyError):
            if plan.storage or database.exists():
                print(report(SweepStudy(open_storage(url), plan)))
                return 0
        message = f"there is no sweep '{plan.name}' in {url} yet to report; start it without --trials 0"
        raise OwlError("sweep.missing", message)
    if plan.storage is None:
        refuse_network(folder, executor)
    # in another process, so that this one stays small: it may run for days beside the trials
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(check, plan, sweep, [*files, *options]).result()
    folder.mkdir(parents=True, exist_ok=True)
    study = SweepStudy.load_or_create(open_storage(url), plan, [*(Path(file).name for file in config), *options])
    if executor == "slurm":
        resources: dict[str, Any] = {"gpus_per_node": gpus_per_worker, "setup": setup, "sbatch": sbatch}
        queue(Job(plan.name, folder / "slurm-%A-%a.log", command, workers, **resources), folder / "workers.sh")
        print(f"Follow them: tail -F {folder}/slurm-*.log   Report: the same command with --trials 0")
        return 0
    local = Workers(study, Path(runs), [*files, *options], workers, threads_per_trial, url, partial(report, study))
    try:
        asyncio.run(local.run())
    finally:
        print(report(study))
    return 128 + local.signal if local.signal else 0


def load_plan(path: str | Path, trials: int | None = None) -> Plan:
    """Read a sweep's YAML; the name defaults to that of the file, and ``trials`` overrides the number of trials.

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


def check(plan: Plan, path: str, arguments: list[str]) -> None:
    """Parse the experiment as fit does from ``arguments``, with every choice and both ends of every range.

    Raises:
        OwlError: A key or a value in the experiment or in the space is invalid.
    """
    from owl.cli.lightning import run_silently  # takes seconds and hundreds of megabytes

    for setting in plan.boundary_settings():
        try:
            with suppress(SystemExit):  # after printing the configuration
                run_silently(["fit", *arguments, *as_options(setting), "--print_config"])
        except OwlError as error:
            key = next((key for key in setting if str(error).startswith(f"option --{key} ")), None)
            message = str(error).replace(f"option --{key}", f"{path}: key 'space.{key}'", 1)
            raise OwlError("sweep.setting", message) from error
