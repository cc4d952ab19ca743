"""What a sweep leaves behind: report.md with pictures, and best.yaml."""

import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.exceptions import ExperimentalWarning
from optuna.storages.journal import JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from owl.atomic import atomic_write
from owl.callbacks.pruning import without_pruning
from owl.sweep import pictures
from owl.sweep.plan import Plan, plain
from owl.sweep.study import KILLS, REASON, SweepStudy, chain_number
from owl.sweep.workers import LOG, trial_name
from owl.version import code_version

LEAST_FOR_IMPORTANCE = 4
"""Complete trials below which importance would be a guess."""
STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def write_report(study: SweepStudy, plan: Plan, runs: Path, command: str) -> None:
    """Write report.md, its pictures and best.yaml into the sweep's folder.

    Args:
        study: The sweep's study.
        plan: The sweep.
        runs: Folder that holds the run folders.
        command: The command line that continues the sweep.
    """
    folder = runs / plan.name
    folder.mkdir(parents=True, exist_ok=True)
    lock = JournalFileOpenLock(str(folder / "report"))  # workers write the same files
    lock.acquire()
    try:
        trials, best = study.chains(), study.best()
        importance = importances(study)
        if best is not None:
            labels = short_names([parameter.key for parameter in plan.space])
            atomic_write(folder / "history.png", pictures.history(trials, plan.objective, study.maximizes))
            parallel = pictures.parallel_coordinates(trials, plan.space, labels, plan.objective, study.maximizes)
            atomic_write(folder / "parallel.png", parallel)
            if importance:
                named = {labels[key]: share for key, share in importance.items()}
                atomic_write(folder / "importance.png", pictures.importance(named, plan.objective))
            write_best(folder / "best.yaml", best, plan, runs)
        atomic_write(folder / "report.md", markdown(study, plan, runs, command, bool(importance)))
    finally:
        lock.release()


def importances(study: SweepStudy) -> dict[str, float]:
    """Return the share of each key in what makes trials good (PED-ANOVA), empty where too few are complete."""
    complete = [t for t in study.chains() if t.state == TrialState.COMPLETE]
    drawn = {key for trial in complete for key in trial.params}
    varied = sorted(key for key in drawn if len({plain(t.params[key]) for t in complete if key in t.params}) > 1)
    if len(complete) < LEAST_FOR_IMPORTANCE or len(varied) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # the best quarter against all: the usual tenth is one or two trials of a short sweep
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
        return optuna.importance.get_param_importances(study.study, evaluator=evaluator, params=varied)


def write_best(path: Path, best: FrozenTrial, plan: Plan, runs: Path) -> None:
    """Write the whole configuration of the best trial as one that fit takes; none where its run is elsewhere."""
    source = runs / trial_name(plan, chain_number(best)) / "config.yaml"
    if not source.exists():
        path.unlink(missing_ok=True)
        return
    configuration = without_pruning(yaml.safe_load(source.read_bytes()))
    configuration |= {"name": f"{plan.name}-best", "ckpt_path": None, "overwrite": False}
    settings = "".join(f"#   {key}: {plain(value)}\n" for key, value in best.params.items())
    header = (
        f"# The best of the sweep '{plan.name}': trial {chain_number(best)}, {plan.objective} {number(best.value)}.\n"
        f"{settings}# Train it: python -m owl fit --config {path}\n"
    )
    atomic_write(path, header + yaml.safe_dump(configuration, sort_keys=False))


def markdown(study: SweepStudy, plan: Plan, runs: Path, command: str, with_importance: bool) -> str:
    """Return the report's text."""
    folder, trials, best = runs / plan.name, study.chains(), study.best()
    counts = Counter(STATES[trial.state] for trial in trials)
    counted = ", ".join(f"{count} {state}" for state, count in counts.items()) or "none begun yet"
    sampler, pruner = (describe(part) for part in (plan.sampler, plan.pruner))
    sections = [
        f"# Sweep {plan.name}",
        f"{len(trials)} of {plan.trials} trials: {counted}. {plan.direction.capitalize()} `{plan.objective}`, sampler "
        f"{sampler}, pruner {pruner}. Written {time.strftime('%Y-%m-%d %H:%M')} by OWL {code_version()}. Continue, add "
        "workers or write this page anew with:",
        f"    {command}",
        "## Best",
    ]
    if best is None:
        sections.append("No trial is complete yet.")
    else:
        run = trial_name(plan, chain_number(best)).removeprefix(f"{plan.name}/")
        rows = "\n".join(f"| `{key}` | {number(value)} |" for key, value in best.params.items())
        sections += [
            f"Trial {chain_number(best)}, in {run}: `{plan.objective}` {number(best.value)}.",
            f"| key | value |\n| --- | ---: |\n{rows}",
        ]
        if (folder / "best.yaml").exists():
            sections += ["Train with it:", f"    python -m owl fit --config {folder / 'best.yaml'}"]
        else:
            sections.append(f"best.yaml is missing, since {folder / run} is not on this machine.")
        sections += ["## What mattered", "![Objective of each trial](history.png)"]
        if with_importance:
            sections.append("![Share of each key in what makes a trial good](importance.png)")
        else:
            sections.append(
                f"Importance needs {LEAST_FOR_IMPORTANCE} complete trials that differ in at least two keys."
            )
        sections.append("![One line for each trial, through its values to its objective](parallel.png)")
    sections += ["## Trials", table(study, plan, folder)]
    return "\n\n".join(sections) + "\n"


def table(study: SweepStudy, plan: Plan, folder: Path) -> str:
    """Return every trial as a row of a Markdown table."""
    keys = [parameter.key for parameter in plan.space]
    labels = short_names(keys)
    best = study.best()
    header = ["trial", "state", f"`{plan.objective}`", *(f"`{labels[key]}`" for key in keys), "minutes", "note"]
    rows = [header, ["---:", "---", *["---:"] * (len(keys) + 2), "---"]]
    for trial in study.chains():
        chain = chain_number(trial)
        value = "" if trial.value is None else number(trial.value)
        if best is not None and trial.number == best.number:
            value = f"**{value}**"
        values = [number(trial.params[key]) if key in trial.params else "" for key in keys]
        minutes = f"{trial.duration.total_seconds() / 60:.1f}" if trial.duration else ""
        run = trial_name(plan, chain).removeprefix(f"{plan.name}/")
        files = [f"{run}/{name}" for name in ("report.md", LOG) if (folder / run / name).exists()]
        linked = f"[{chain}]({files[0]})" if files else str(chain)
        rows.append([linked, STATES[trial.state], value, *values, minutes, note(trial)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def note(trial: FrozenTrial) -> str:
    """Return what is to be said of a trial: why it ended, how often it was continued."""
    interruptions = len(trial.system_attrs.get("retry_history", []))
    killed = trial.user_attrs.get(KILLS, 0)
    times = "once" if interruptions == 1 else f"{interruptions} times"
    parts = [str(trial.user_attrs.get(REASON, ""))]
    if interruptions:
        parts.append(f"interrupted {times}" + (f", {killed} by a kill" if killed else ""))
    return "; ".join(filter(None, parts)).replace("|", "\\|")


def describe(part: dict[str, Any]) -> str:
    """Return a sampler or pruner with its arguments."""
    arguments = ", ".join(f"{key} {plain(value)}" for key, value in part.items() if key != "name")
    return f"{part['name']} ({arguments})" if arguments else str(part["name"])


def number(value: Any) -> str:
    """Four significant digits of a number, anything else as it is, for a table."""
    return f"{value:.4g}" if isinstance(value, float) else plain(value).replace("|", "\\|")


def short_names(keys: list[str]) -> dict[str, str]:
    """Return for each key the shortest end of it that no other key has, without ``init_args``."""
    words = {key: [word for word in key.split(".") if word != "init_args"] for key in keys}

    def end(key: str, length: int) -> str:
        return ".".join(words[key][-length:])

    found = {}
    for key in keys:
        lengths = range(1, len(words[key]) + 1)
        unique = (n for n in lengths if [end(other, n) for other in keys].count(end(key, n)) == 1)
        found[key] = end(key, next(unique, len(words[key])))
    return found
