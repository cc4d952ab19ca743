"""Pictures of a sweep, as PNG: what each trial reached, which keys mattered, which values went together."""

import io
import math

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from owl.sweep.plan import Parameter, plain
from owl.sweep.study import chain_number, value_of

ACCENT, GREY, BAD = "#7c3aed", "#a1a1aa", "#f87171"
MAP = "viridis"
UNUSED = -0.12
"""Where a line passes an axis whose key did not count in its trial, in heights of the axis."""
TICKS = 5
LONGEST_LABEL = 28
"""Characters of a choice."""


def history(trials: list[FrozenTrial], objective: str, maximizes: bool) -> bytes:
    """Draw the objective of each trial, the best so far, and where trials failed."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots()
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    pruned = [t for t in trials if t.state == TrialState.PRUNED and t.value is not None]
    failed = [chain_number(t) for t in trials if t.state == TrialState.FAIL]
    best = np.maximum.accumulate if maximizes else np.minimum.accumulate
    numbers = [chain_number(t) for t in complete]
    axes.step(numbers, best([value_of(t) for t in complete]), where="post", color=ACCENT, label="best so far")
    axes.scatter(numbers, [value_of(t) for t in complete], color=ACCENT, zorder=3, label="complete")
    if pruned:
        values = [value_of(t) for t in pruned]
        axes.scatter([chain_number(t) for t in pruned], values, color=GREY, marker="v", zorder=3, label="pruned")
    if failed:
        at = [0.03] * len(failed)
        transform = axes.get_xaxis_transform()
        axes.scatter(failed, at, color=BAD, marker="x", zorder=3, transform=transform, label="failed")
    axes.set(xlabel="trial", ylabel=objective, title=f"{objective}: {'higher' if maximizes else 'lower'} is better")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _png(figure)


def importance(shares: dict[str, float], objective: str) -> bytes:
    """Draw a bar for each key.

    Args:
        shares: Key to its share, which add up to 1.
        objective: The metric.
    """
    figure = Figure(figsize=(10, 1.2 + 0.45 * len(shares)), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(shares.items(), key=lambda item: item[1])
    bars = axes.barh([name for name, _ in ordered], [share for _, share in ordered], color=ACCENT, height=0.6)
    axes.bar_label(bars, [f"{share:.0%}" for _, share in ordered], padding=4)
    axes.set(xlim=(0, 1.08), title=f"Share in what makes {objective} good (PED-ANOVA)")
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    return _png(figure)


def parallel_coordinates(
    trials: list[FrozenTrial], space: list[Parameter], labels: dict[str, str], objective: str, maximizes: bool
) -> bytes:
    """Draw one line for each trial with a value, through what it was given to what it reached; the best on top.

    Args:
        trials: Of the sweep; at least one has a value.
        space: Keys, one axis each.
        labels: Names of the axes.
        objective: The last axis.
        maximizes: Whether more of it is better.
    """
    shown = [t for t in trials if t.value is not None and t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    shown.sort(key=lambda t: value_of(t) if maximizes else -value_of(t))
    values = [value_of(t) for t in shown]
    scale = Scale.of_numbers(values, log=False)
    scales = [Scale.of(p, [t.params[p.key] for t in shown if p.key in t.params]) for p in space]
    figure = Figure(figsize=(max(8, 2.0 * (len(space) + 1)), 4.6), layout="constrained")
    axes = figure.subplots()
    norm = Normalize(min(values), max(values) if max(values) > min(values) else min(values) + 1)
    colours = colormaps[MAP if maximizes else f"{MAP}_r"]
    for trial, value in zip(shown, values, strict=True):
        heights = [
            s.height(trial.params[p.key]) if p.key in trial.params else UNUSED
            for p, s in zip(space, scales, strict=True)
        ]
        line = "-" if trial.state == TrialState.COMPLETE else ":"
        axes.plot(range(len(space) + 1), [*heights, scale.height(value)], line, color=colours(norm(value)), lw=1.8)
    for position, axis in enumerate([*scales, scale]):
        axis.draw(axes, position)
    conditional = any(p.key not in t.params for t in shown for p in space)
    axes.set(xlim=(-0.1, len(space) + 0.1), ylim=(UNUSED - 0.05 if conditional else -0.04, 1.04), yticks=[])
    axes.set_xticks(range(len(space) + 1), [*(labels[p.key] for p in space), objective])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if conditional:
        axes.text(-0.06, UNUSED, "not used", ha="right", va="center", color=GREY)
    figure.colorbar(ScalarMappable(norm, colours), ax=axes, label=objective, pad=0.08)
    if any(t.state == TrialState.PRUNED for t in shown):
        axes.set_xlabel("dotted: pruned")
    return _png(figure)


class Scale:
    """One axis: where values stand on it, between 0 and 1.

    Args:
        choices: Of a key with choices, in order.
        low: End of a range.
        high: The other.
        log: Whether it is logarithmic.
    """

    def __init__(self, choices: list[str] | None, low: float, high: float, log: bool) -> None:
        self.choices, self.low, self.high, self.log = choices, low, high, log

    @classmethod
    def of(cls, parameter: Parameter, drawn: list) -> "Scale":
        """Return the axis of a key: all of its choices, but only as much of its range as was drawn."""
        if isinstance(parameter.distribution, CategoricalDistribution):
            return cls([plain(c) for c in parameter.distribution.choices], 0, 1, False)
        return cls.of_numbers(drawn or parameter.extremes(), parameter.distribution.log)  # type: ignore[attr-defined,arg-type]

    @classmethod
    def of_numbers(cls, values: list[float], log: bool) -> "Scale":
        """Return an axis as long as the numbers are spread."""
        return cls(None, min(values), max(values), log)

    def height(self, value: object) -> float:
        """Where a value stands; the middle where all are equal."""
        if self.choices is not None:
            return self.choices.index(plain(value)) / (len(self.choices) - 1) if len(self.choices) > 1 else 0.5  # type: ignore[arg-type]
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, float(value)))  # type: ignore[arg-type]
        return (at - low) / (high - low) if high > low else 0.5

    def draw(self, axes: Axes, position: int) -> None:
        """Draw it with its ticks."""
        axes.axvline(position, ymin=0, color=GREY, lw=1, zorder=0)
        if self.choices is not None:
            ticks = [
                (self.height(c), c if len(c) <= LONGEST_LABEL else f"...{c[-LONGEST_LABEL:]}") for c in self.choices
            ]
        elif self.high == self.low:
            ticks = [(0.5, f"{self.low:.4g}")]
        else:
            low, high = (math.log(v) if self.log else v for v in (self.low, self.high))
            heights = np.linspace(0, 1, TICKS)
            ticks = [(h, f"{math.exp(v) if self.log else v:.3g}") for h in heights for v in [low + h * (high - low)]]
        for height, label in ticks:
            box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
            axes.text(position + 0.03, height, label, ha="left", va="center", fontsize=9, bbox=box, zorder=4)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    with matplotlib.rc_context({"font.size": 10}):
        FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()
