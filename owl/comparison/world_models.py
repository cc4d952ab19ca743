"""A page with the rollouts of several world models side by side, under the same controls and seeds."""

import json
import shlex
import time
from pathlib import Path

from owl.atomic import atomic_write
from owl.comparison.evaluation import Evaluation
from owl.comparison.rollouts import shown_rollouts
from owl.hardware import device_name
from owl.metrics.frechet import FrechetDistance
from owl.version import code_version
from owl.viz.comparison import Column, figure, page
from owl.viz.rollouts import HORIZONS

EACH = ("--steps", "--shift", "--sampler", "--guidance")
"""Options of `python -m owl rollout` that take a value for each world model."""
SHOWN = 6
"""Number of rollouts on the page."""


def columns(metrics: dict[str, dict[str, float]]) -> list[Column]:
    """Return the columns of the table, as far as any world model has their metrics.

    Args:
        metrics: From `owl.comparison.evaluation.Evaluation.run`, by world model, with ``steps``.
    """
    known = {name for values in metrics.values() for name in values}
    reached = [h for h in HORIZONS if f"lpips_{h}" in known]
    segments = [n for n in next(iter(metrics.values())) if n.startswith(f"{FrechetDistance.name}_") and n[-1].isdigit()]
    last = segments[-1].removeprefix(f"{FrechetDistance.name}_").replace("_", " to ") if segments else ""
    found = [
        Column("steps", "steps", 0, "", "per frame"),
        *(Column(f"lpips_{h}", f"LPIPS, frame {h}", 3, "lower") for h in dict.fromkeys([1, 8, *reached[-1:]])),
        *(Column(name, f"Fréchet, frames {last}", 1, "lower", "distance") for name in segments[-1:]),
        Column("drift", "drift", 2, "lower"),
        Column("flicker", "flicker", 1, "", "1e-6", 1e6),
        Column("action_accuracy_ratio", "actions", 3, "higher", "of true frames"),
        Column("scripts_accuracy", "scripts", 3, "higher"),
        Column("revisit_lpips", "LPIPS, revisit", 3, "lower"),
        Column("frames_per_second", "frames/s", 1, "higher"),
    ]
    return [column for column in found if column.name in known]


def notes(metrics: dict[str, dict[str, float]], lpips_name: str) -> list[str]:
    """Return what the columns mean."""
    first = next(iter(metrics.values()))
    baseline = f" Repeating the last frame of the context has {first['repeat_lpips_1']:.3f} in frame 1."
    paragraphs = [
        f"LPIPS ({lpips_name}) is the distance to the true frame; a game has many possible futures, so far from the "
        f"context it depends on chance.{baseline} The Fréchet distance ({FrechetDistance.name}) compares the "
        f"distributions of frames; that of true frames is {first[f'{FrechetDistance.name}_true']:.1f}."
        if f"{FrechetDistance.name}_true" in first
        else f"LPIPS ({lpips_name}) is the distance to the true frame.{baseline}",
        "Flicker is the energy of fine detail that changes from frame to frame, generated minus true; blur makes it "
        "negative.",
    ]
    if "scripts_accuracy_true" in first:
        paragraphs.append(
            f"Scripts are scripted controls; in the game's own frames {first['scripts_accuracy_true']:.3f}."
        )
    if "revisit_lpips_true" in first:
        paragraphs.append(
            "Revisit compares the end of loops with their start: "
            f"{first['revisit_lpips_true']:.3f} in the game itself. A world that does not move has 0."
        )
    return paragraphs


def write_page(out: Path, evaluations: dict[str, Evaluation], results: dict[str, dict[str, float]]) -> None:
    """Write index.html, comparison.png and metrics.json, which has the metrics of every world model.

    Args:
        out: Their folder.
        evaluations: By name, after they have run.
        results: Their metrics.
    """
    first = next(iter(evaluations.values()))
    settings, lpips_name = first.settings, first.lpips.name
    metrics = {name: {"steps": evaluations[name].settings.sampling.steps} | values for name, values in results.items()}
    shown = shown_rollouts(
        first.clips,
        SHOWN,
        lambda row: {name: evaluation.clips.generated[row] for name, evaluation in evaluations.items()},
    )
    text = page(
        title=f"{len(evaluations)} world models under the same controls",
        facts={
            "dataset": f"{settings.data}, {settings.split} split",
            "measured on": f"{first.clips.horizon} frames of {len(first.clips.true)} rollouts, and "
            f"{settings.frames} of {settings.side_by_side}",
            "device": device_name(first.engine.device),
            "written": f"{time.strftime('%Y-%m-%d %H:%M')} by OWL {code_version()}",
        },
        columns=columns(metrics),
        values=metrics,
        notes=notes(metrics, lpips_name),
        heading=f"{len(shown)} rollouts",
        clips=shown,
        fps=first.episodes.fps,
        command=command([evaluation.settings.command(out) for evaluation in evaluations.values()]),
        kind="world model",
    )
    footers = {name: f"LPIPS {values['lpips_1']:.3f} in frame 1" for name, values in metrics.items()}
    atomic_write(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    atomic_write(out / "comparison.png", figure(shown, footers))
    atomic_write(out / "index.html", text)


def command(single: list[str]) -> str:
    """Join the commands of single evaluations to one.

    The options that can have a value for each world model (``EACH``) get all of theirs; other options that differ are
    left out: they name the parts of shared worlds, which each world finds on its own.
    """
    parsed = [shlex.split(each)[4:] for each in single]
    words = ["python", "-m", "owl", "rollout", *(words[0] for words in parsed)]
    options: dict[str, list[list[str]]] = {}
    for each in parsed:
        name = ""
        for word in each[1:]:
            if word.startswith("--"):
                name = word
                options.setdefault(name, []).append([])
            else:
                options[name][-1].append(word)
    for name, values in options.items():
        if len(values) == len(single) and all(value == values[0] for value in values):
            words += [name, *values[0]]
        elif name in EACH:
            words += [name, *(word for value in values for word in value)]
    return shlex.join(words)
