"""Results of a sweep: report.md with pictures, and best.yaml."""

import io
import time
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import optuna
import yaml
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState, create_trial
from optuna.visualization import matplotlib as plots

from owl.atomic import atomic_write
from owl.callbacks.pruning import without_pruning
from owl.sweep.plan import Plan, described, plain
from owl.sweep.study import KILLS, PRUNED, REASON, SweepStudy, chain_number, history
from owl.sweep.workers import LOG, short, trial_name
from owl.version import code_version

LEAST_FOR_IMPORTANCE = 4
"""Number of complete trials required to estimate importance."""


def write_report(study: SweepStudy, runs: Path, command: str) -> None:
    """Write report.md, its pictures and best.yaml into the sweep's folder.

    Args:
        study: The sweep's study.
        runs: Folder that holds the run folders.
        command: The command line that continues the sweep.
    """
    folder, best = runs / study.plan.name, study.best()
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(study) if best else {}
    for name, picture in pictures.items():
        atomic_write(folder / f"{name}.png", picture)
    if best:
        write_best(folder / "best.yaml", best, study.plan, runs)
    atomic_write(folder / "report.md", markdown(study, folder, command, "importance" in pictures))


def draw(study: SweepStudy) -> dict[str, bytes]:
    """Draw the history, the parallel coordinates and the importances of the keys, as PNG files by name."""
    names = short_names(study)
    shown = optuna.create_study(direction=study.plan.direction)  # with short names, and without interrupted trials
    for trial in study.chains():
        if trial.state == TrialState.COMPLETE:
            params, ranges = ({names[k]: v for k, v in d.items()} for d in (trial.params, trial.distributions))
            shown.add_trial(create_trial(value=trial.value, params=params, distributions=ranges))
    complete = shown.trials
    drawn = {name: {plain(t.params[name]) for t in complete if name in t.params} for name in names.values()}
    varied = sorted(name for name, values in drawn.items() if len(values) > 1)
    matplotlib.use("Agg")
    figures: dict[str, Any] = {
        "history": plots.plot_optimization_history(shown, target_name=study.plan.objective),
        "parallel": plots.plot_parallel_coordinate(shown, target_name=study.plan.objective),
    }
    if len(complete) >= LEAST_FOR_IMPORTANCE and len(varied) > 1:
        # the best quarter against all: the usual tenth is one or two trials of a short sweep
        evaluator = PedAnovaImportanceEvaluator(target_quantile=0.25)
        figures["importance"] = plots.plot_param_importances(shown, evaluator=evaluator, params=varied)
    pictures = {name: io.BytesIO() for name in figures}
    for name, axes in figures.items():
        axes.figure.savefig(pictures[name], format="png", bbox_inches="tight")
        matplotlib.pyplot.close(axes.figure)
    return {name: picture.getvalue() for name, picture in pictures.items()}


def write_best(path: Path, best: FrozenTrial, plan: Plan, runs: Path) -> None:
    """Write the complete configuration of the best trial for fit; none if its run is on another machine."""
    source = runs / trial_name(plan, chain_number(best)) / "config.yaml"
    if not source.exists():
        path.unlink(missing_ok=True)
        return
    configuration = without_pruning(yaml.safe_load(source.read_bytes()))
    configuration |= {"name": f"{plan.name}-best", "ckpt_path": None, "overwrite": False}
    settings = "".join(f"#   {key}: {plain(value)}\n" for key, value in best.params.items())
    header = (
        f"# The best of the sweep '{plan.name}': trial {chain_number(best)}, {plan.objective} {short(best.value)}.\n"
        f"{settings}# Train it: python -m owl fit --config {path}\n"
    )
    atomic_write(path, header + yaml.safe_dump(configuration, sort_keys=False))


def markdown(study: SweepStudy, folder: Path, command: str, with_importance: bool) -> str:
    """Return the report's text."""
    plan, trials, best = study.plan, study.chains(), study.best()
    counts = Counter(state_of(trial) for trial in trials)
    counted = ", ".join(f"{count} {state}" for state, count in counts.items()) or "none begun yet"
    sampler, pruner = (", ".join(map(plain, described(part).values())) for part in (plan.sampler, plan.pruner))
    sections = [
        f"# Sweep {plan.name}",
        f"{len(trials)} of {plan.trials} trials: {counted}. {plan.direction.capitalize()} `{plan.objective}`, sampler "
        f"{sampler}, pruner {pruner}. Written {time.strftime('%Y-%m-%d %H:%M')} by OWL {code_version()}. Continue, add "
        "workers, or update this report with:",
        f"    {command}",
        "## Best",
    ]
    if best is None:
        sections.append("No trial is complete yet.")
    else:
        run = Path(trial_name(plan, chain_number(best))).name
        has_yaml = (folder / "best.yaml").exists()
        sections += [
            f"Trial {chain_number(best)}, in {run}: `{plan.objective}` {cell(best.value)}.",
            table([["key", "value"], ["---", "---:"], *([f"`{k}`", cell(v)] for k, v in best.params.items())]),
            *(["Train with it:"] if has_yaml else []),
            f"    python -m owl fit --config {folder / 'best.yaml'}"
            if has_yaml
            else f"There is no best.yaml, because {folder / run} is not on this machine.",
            "## Importance",
            "![Objective of each complete trial](history.png)",
            "![Importance of each key (PED-ANOVA)](importance.png)"
            if with_importance
            else f"Importance needs at least {LEAST_FOR_IMPORTANCE} complete trials that differ in two keys.",
            "![Objective and values of each complete trial](parallel.png)",
        ]
    names = short_names(study)
    header = ["trial", "state", f"`{plan.objective}`", *(f"`{name}`" for name in names.values()), "minutes", "note"]
    rows = [header, ["---:", "---", *["---:"] * (len(names) + 2), "---"]]
    for trial in trials:
        run = Path(trial_name(plan, chain_number(trial))).name
        files = [f"{run}/{name}" for name in ("report.md", LOG) if (folder / run / name).exists()]
        number = f"[{chain_number(trial)}]({files[0]})" if files else str(chain_number(trial))
        is_best = best is not None and trial.number == best.number
        value = f"**{cell(trial.value)}**" if is_best else "" if trial.value is None else cell(trial.value)
        values = [cell(trial.params[key]) if key in trial.params else "" for key in names]
        minutes = f"{trial.duration.total_seconds() / 60:.1f}" if trial.duration else ""
        rows.append([number, state_of(trial), value, *values, minutes, note(trial)])
    return "\n\n".join([*sections, "## Trials", table(rows)]) + "\n"


def table(rows: list[list[str]]) -> str:
    """Return a Markdown table; the first two rows are its head."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def state_of(trial: FrozenTrial) -> str:
    """Return the state of a trial as one word."""
    return "failed" if trial.state == TrialState.FAIL else trial.state.name.lower()


def note(trial: FrozenTrial) -> str:
    """Return notes on a trial: why it ended, how often it was interrupted."""
    attributes, interruptions = trial.user_attrs, len(history(trial))
    parts = [cell(attributes[REASON])] if REASON in attributes else []
    if trial.state == TrialState.PRUNED:
        parts.append(f"pruned after validation {attributes.get(PRUNED)}")
    if interruptions:
        parts.append(f"interrupted {interruptions} times, {attributes.get(KILLS, 0)} by a kill")
    return "; ".join(parts)


def cell(value: Any) -> str:
    """Format a number with four significant digits for a table; return other values as text."""
    return short(value).replace("|", "\\|")


def short_names(study: SweepStudy) -> dict[str, str]:
    """Return the shortest unique suffix of each key of the space, without ``init_args``."""
    words = {key: [word for word in key.split(".") if word != "init_args"] for key in study.plan.space}
    found: dict[str, str] = {}
    for key, own in words.items():
        ends = (n for n in range(1, len(own)) if [w[-n:] for w in words.values()].count(own[-n:]) == 1)
        found[key] = ".".join(own[-next(ends, len(own)) :])
    return found
