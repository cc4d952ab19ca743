"""Results of a sweep: report.md with pictures, and best.yaml."""

import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.storages import RetryHeartbeatStaleTrialCallback as Retry
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as plots

from owl.atomic import atomic_write
from owl.configuration import dump, without_callback
from owl.sweep.plan import plain, short
from owl.sweep.study import KILLS, PRUNED, REASON, SweepStudy, chain_number
from owl.sweep.workers import PRUNING, trial_name
from owl.version import code_version

MIN_TRIALS_FOR_IMPORTANCE = 4  # complete trials


def write_report(study: SweepStudy, runs: Path, command: str) -> str:
    """Write report.md with its pictures, and best.yaml; return a summary. ``command`` continues the sweep."""
    plan, trials, folder = study.plan, study.chains(), runs / study.plan.name
    counts = Counter(map(state_of, trials))
    counted = ", ".join(f"{count} {state}" for state, count in counts.items()) or "none started yet"
    best = write_best(study, folder)
    sections = [
        f"# Sweep {plan.name}",
        f"{len(trials)} of {plan.trials} trials: {counted}. {plan.direction.capitalize()} `{plan.objective}`, sampler "
        f"{plain(plan.sampler)}, pruner {plain(plan.pruner)}. Written {time.strftime('%Y-%m-%d %H:%M')} by OWL "
        f"{code_version()}. Continue, add workers, or update this report with:",
        f"    {command}",
        f"## Best\n\n{best}",
        *plot(study, folder),
        f"## Trials\n\n{table(study)}\n",
    ]
    atomic_write(folder / "report.md", "\n\n".join(sections))
    return f"{best}\nReport: {folder / 'report.md'}"


def write_best(study: SweepStudy, folder: Path) -> str:
    """Describe the best trial, and write its configuration to best.yaml unless its run is on another machine."""
    plan, best, path = study.plan, study.best(), folder / "best.yaml"
    if best is None:
        return "No trial is complete yet."
    run = folder / trial_name(chain_number(best))
    params = ", ".join(f"`{key}` {short(value)}" for key, value in best.params.items())
    message = f"Trial {chain_number(best)}, in {run.name}: `{plan.objective}` {short(best.value)}. Settings: {params}."
    if not (run / "config.yaml").exists():
        path.unlink(missing_ok=True)
        return f"{message} There is no best.yaml, because {run} is not on this machine."
    configuration = without_callback(yaml.safe_load((run / "config.yaml").read_bytes()), PRUNING)
    configuration |= {"name": f"{plan.name}-best", "ckpt_path": None, "overwrite": False}
    message += f" Train with it: `python -m owl fit --config {path}`"
    atomic_write(path, f"# {message}\n{dump(configuration)}")
    return message


def plot(study: SweepStudy, folder: Path) -> list[str]:
    """Plot the optimization history, the importances and the parallel coordinates; return them as Markdown."""
    complete, objective = study.study.get_trials(states=(TrialState.COMPLETE,)), study.plan.objective
    if not complete:
        return []
    names = study.plan.names.values()
    varied = [name for name in names if len({plain(t.params[name]) for t in complete if name in t.params}) > 1]
    matplotlib.use("Agg")
    figures: dict[str, Any] = {"history": plots.plot_optimization_history(study.study, target_name=objective)}
    if len(complete) >= MIN_TRIALS_FOR_IMPORTANCE and len(varied) > 1:
        # the best quarter against all: the usual tenth is one or two trials of a short sweep
        evaluator = PedAnovaImportanceEvaluator(target_quantile=0.25)
        figures["importance"] = plots.plot_param_importances(study.study, evaluator=evaluator, params=varied)
    if varied:
        figures["parallel"] = plots.plot_parallel_coordinate(study.study, params=varied, target_name=objective)
    for name, axes in figures.items():
        atomic_write(folder / f"{name}.png", partial(axes.figure.savefig, format="png", bbox_inches="tight"))
        matplotlib.pyplot.close(axes.figure)
    return ["## Importance", *(f"![{name}]({name}.png)" for name in figures)]


def table(study: SweepStudy) -> str:
    """Return a Markdown table of all trials."""
    names, best = study.plan.names.values(), study.best()
    header = ["trial", "state", f"`{study.plan.objective}`", *(f"`{name}`" for name in names), "minutes", "note"]
    rows = [header, ["---:", "---", *["---:"] * (len(names) + 2), "---"]]
    for trial in study.chains():
        number, value = chain_number(trial), "" if trial.value is None else short(trial.value)
        row = [
            f"[{number}]({trial_name(number)})",
            state_of(trial),
            f"**{value}**" if best and trial.number == best.number else value,
            *(short(trial.params[name]) if name in trial.params else "" for name in names),
            f"{trial.duration.total_seconds() / 60:.1f}" if trial.duration else "",
            note(trial),
        ]
        rows.append([cell.replace("|", "\\|") for cell in row])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def state_of(trial: FrozenTrial) -> str:
    """Return the state of a trial as one word."""
    return "failed" if trial.state == TrialState.FAIL else trial.state.name.lower()


def note(trial: FrozenTrial) -> str:
    """Return notes on a trial: why it ended, how often it was interrupted."""
    attributes, interruptions = trial.user_attrs, len(Retry.retry_history(trial))
    parts = [attributes[REASON]] if REASON in attributes else []
    if PRUNED in attributes:
        parts.append(f"pruned after validation {attributes[PRUNED]}")
    if interruptions:
        parts.append(f"interrupted {interruptions} times, {attributes.get(KILLS, 0)} by a kill")
    return "; ".join(parts)
