"""``python -m owl rerun``: repeat a run and compare."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from owl.callbacks.report import ENVIRONMENT
from owl.checkpoint import load_checkpoint
from owl.configuration import without_callback
from owl.errors import OwlError, at_least
from owl.sweep.workers import PRUNING
from owl.viz.numbers import format_number

UNREPEATABLE = ("seconds", "data_wait", "speed/")  # prefixes of metrics that depend on the clock
MARKS = ("epoch", "hp_metric")  # curves that are not measurements
TIMERS = ("lightning.pytorch.callbacks.Timer", "lightning.pytorch.callbacks.timer.Timer")
NEVER = "36500:00:00:00"  # with a time limit, training needs no last step


def main(run: str, *, name: str | None = None, steps: int | None = None) -> int:
    """Repeat a run from its folder, under another name and in a new process, and check that the result is the same.

    Metrics and weights must be equal bit for bit, except for those that depend on the clock. With --steps only the
    first steps are repeated, and the values logged up to there are compared instead.

    Args:
        run: The run's folder, such as runs/quickstart. It needs the same data at the same path.
        name: Name of the repetition; default: the name of the run with "-again".
        steps: Repeat only this number of steps, with the same learning rates.

    Returns:
        0 if the result is the same, 1 if not.
    """
    folder = Path(run)
    again = folder.parent / (name or f"{folder.resolve().name}-again")
    limit = steps_to_repeat(folder, steps)
    partial = steps is not None and limit < recorded_metrics(folder)["steps"]
    if again.resolve() == folder.resolve() or (again / "checkpoints" / "last.ckpt").exists():
        raise OwlError("run.exists", f"{again} already holds a run; choose another --name, or remove it")
    repeat(folder, again, limit)
    rows = list(compare_curves(folder, again, limit) if partial else compare_results(folder, again))
    different = [row for row in rows if row[1] != row[2]]
    print_rows(rows, list(compare_environments(folder, again)))
    what = f"the first {limit} steps of {folder}" if partial else str(folder)
    if different:
        names = ", ".join(row[0] for row in different[:3]) + (", ..." if len(different) > 3 else "")
        print(f"{again} differs from {what} in {len(different)} of {len(rows)} values: {names}")
        return 1
    print(f"{again} equals {what}: all of {len(rows)} values are the same")
    return 0


def steps_to_repeat(folder: Path, steps: int | None) -> int:
    """Return the step to stop after: the run's last one, or ``steps`` if that is less.

    Raises:
        OwlError: The folder lacks files for a repetition, or ``steps`` is below 1.
    """
    for file in ("config.yaml", "metrics.json", "checkpoints/last.ckpt"):
        if not (folder / file).is_file():
            raise OwlError(
                "rerun.folder", f"{folder / file} does not exist, expected the folder of a finished run; give one"
            )
    last = int(recorded_metrics(folder)["steps"])
    if steps is None:
        return last
    at_least(1, steps=steps)
    if steps < last and not list(folder.glob("events.out.tfevents.*")):
        raise OwlError(
            "rerun.curves",
            f"{folder} contains no TensorBoard curves, which --steps needs; repeat the whole run",
        )
    return min(steps, last)


def recorded_metrics(folder: Path) -> dict[str, float]:
    """Read a run's metrics.json.

    Raises:
        OwlError: It is damaged.
    """
    try:
        metrics: dict[str, float] = json.loads((folder / "metrics.json").read_bytes())
        if isinstance(metrics["steps"], int | float):
            return metrics
    except (ValueError, KeyError, TypeError):
        pass
    raise OwlError("rerun.folder", f"{folder / 'metrics.json'} contains no metrics of a run; repeat another run")


def repeat(folder: Path, again: Path, last: int) -> None:
    """Run fit with a run's configuration under another name, up to a step.

    Raises:
        OwlError: It failed; its error is in the terminal.
    """
    config = folder / "config.yaml"
    configuration = yaml.safe_load(config.read_bytes()) or {}
    start = configuration.get("ckpt_path")
    if start and Path(start).resolve().parent == (folder / "checkpoints").resolve():
        start = None  # it was interrupted and resumed, which does not change the result
    alone = without_callback(configuration, PRUNING)
    trainer = alone.get("trainer") or {}
    callbacks = trainer.get("callbacks") or []
    others = [callback for callback in callbacks if callback["class_path"] not in TIMERS]
    limited = trainer.get("max_time") is not None or others != callbacks
    plan = load_checkpoint(folder / "checkpoints" / "last.ckpt").get("budget", {}).get("changes")
    command = [
        *(sys.executable, "-m", "owl", "fit", "--config", str(config), "--name", again.name),
        *("--runs", str(again.parent), "--overwrite", "false", "--ckpt_path", start or "null"),
        *(("--trainer.callbacks", json.dumps(others)) if alone != configuration or others != callbacks else ()),
        # if a time limit ended the run, its plan determines the learning rates, regardless of the machine's speed
        *("--trainer.max_time", NEVER if limited else "null", "--budget.plan", json.dumps(plan or None)),
        *("--trainer.callbacks+", "owl.callbacks.stop_at.StopAt", "--trainer.callbacks.step", str(last)),
    ]
    status = subprocess.run(command).returncode
    if status:
        raise OwlError(
            "rerun.failed",
            f"the repetition of {folder} ended with status {status} and the error above; fix it and try again",
        )


Row = tuple[str, str, str]
"""Name of a compared value, and its exact value in the run and in the repetition."""


def compare_results(folder: Path, again: Path) -> Iterator[Row]:
    """Yield all metrics that do not depend on the clock, then the largest difference of the weights."""
    before, after = recorded_metrics(folder), recorded_metrics(again)
    for key in [*before, *(key for key in after if key not in before)]:
        if not key.startswith(UNREPEATABLE):
            yield key, exact(before.get(key)), exact(after.get(key))
    difference = weight_difference(folder, again)
    yield "weights, largest difference", "0", exact(difference) if difference else "0"


def weight_difference(folder: Path, again: Path) -> float:
    """Return the largest absolute difference of the weights in ``last.ckpt``; infinite if names or shapes differ."""
    before, after = (load_checkpoint(f / "checkpoints" / "last.ckpt")["state_dict"] for f in (folder, again))
    if {k: v.shape for k, v in before.items()} != {k: v.shape for k, v in after.items()}:
        return float("inf")
    largest = 0.0
    for key, value in before.items():
        if not torch.equal(value, after[key]):
            difference = float((value.double() - after[key].double()).abs().max())
            largest = max(largest, difference if difference >= 0 else float("inf"))  # NaN is not
    return largest


def compare_curves(folder: Path, again: Path, last: int) -> Iterator[Row]:
    """Yield every curve that both runs logged up to a step: the number of points, and the first one that differs.

    Raises:
        OwlError: The runs have no point in common.
    """
    before, after = curves(folder), curves(again)
    common = sorted(point for point in before.keys() & after.keys() if point[1] <= last)
    if not common:
        raise OwlError("rerun.steps", f"nothing was logged in the first {last} steps of {folder}; give more --steps")
    for tag in dict.fromkeys(tag for tag, _ in common):
        steps = [step for name, step in common if name == tag]
        # as text, since NaN equals NaN here
        shown = next((step for step in steps if exact(before[tag, step]) != exact(after[tag, step])), steps[-1])
        yield f"{tag} at step {shown}", exact(before[tag, shown]), exact(after[tag, shown])


def curves(folder: Path) -> dict[tuple[str, int], float]:
    """Read scalars from a run's TensorBoard files by name and step (from 0), without those that depend on the clock."""
    found: dict[tuple[str, int], float] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), {"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if not tag.startswith(UNREPEATABLE) and tag not in MARKS:
                found |= {(tag, event.step): event.value for event in events.Scalars(tag)}
    return found


def compare_environments(folder: Path, again: Path) -> Iterator[Row]:
    """Yield entries of the two environments that differ, except for those about how each run was started."""
    try:
        before = flat(json.loads((folder / ENVIRONMENT).read_bytes()))
    except (OSError, ValueError):
        yield ENVIRONMENT, "not recorded", "recorded"
        return
    after = flat(json.loads((again / ENVIRONMENT).read_bytes()))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and key not in ("command", "folder"):
            yield key, format_entry(key, before.get(key, "-")), format_entry(key, after.get(key, "-"))


def format_entry(key: str, value: Any) -> str:
    """Format an entry of an environment; for changes of tracked files, only their length."""
    return f"{len(str(value))} characters" if key.endswith(".diff") else str(value)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings and lists to one mapping by dotted path."""
    if not isinstance(values, dict | list):
        return {prefix: values}
    below = values.items() if isinstance(values, dict) else enumerate(values)
    found: dict[str, Any] = {}
    for key, value in below:
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def exact(value: float | None) -> str:
    """Format a number such that different numbers look different; "-" for None."""
    return "-" if value is None else repr(value)


def print_rows(rows: list[Row], environments: list[Row]) -> None:
    """Print the compared values, exactly where they differ, and the differences of the environments below a line."""
    table = Table(title="The run and its repetition", title_justify="left")
    for column in ("", "run", "again", ""):
        table.add_column(column, overflow="fold")
    for name, before, after in rows:
        if before == after:
            shown = before if before == "-" else format_number(float(before))
            table.add_row(name, shown, shown, "same")
        else:
            table.add_row(name, before, after, "different")
    table.add_section()
    for name, before, after in environments:
        table.add_row(name, before, after, "environment")
    Console(markup=False).print(table)
