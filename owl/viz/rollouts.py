"""Pictures of an evaluation: curves, and generated frames next to true ones."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from math import ceil, sqrt
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from owl.spacing import evenly_spaced
from owl.viz.film import ControlsPanel, as_array, beside, captioned, enlarged
from owl.viz.pictures import BACKGROUND, FAINT, GAP, TEXT, tile_row, tile_size

if TYPE_CHECKING:
    from owl.rollout.episodes import Batch
    from owl.rollout.evaluation import Clips, Drift

HORIZONS = (1, 2, 4, 8, 16, 32, 64, 128)
STRIP_CLIPS = 4
FILM_CLIPS = 8
STRIP_WIDTHS = (240, 320)  # pixels: narrower frames are enlarged by an integer factor, wider ones reduced
STRIP_FONT, CAPTION = 22, 36  # pixels; a strip is wide and usually displayed scaled down
MODEL_COLOUR, BASELINE_COLOUR = "#7c3aed", "#a1a1aa"
GENERATED = (196, 181, 253)


def horizon_chart(curves: dict[str, list[float]], lpips_name: str) -> bytes:
    """Plot PSNR and LPIPS against the horizon, for the model and for repeating the last frame, as PNG."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, name, label, better in zip(
        figure.subplots(1, 2),
        ("psnr", "lpips"),
        ("PSNR (dB)", f"LPIPS ({lpips_name})"),
        ("higher", "lower"),
        strict=True,
    ):
        horizon = range(1, len(curves[name]) + 1)
        axes.plot(horizon, curves[name], color=MODEL_COLOUR, marker=".", label="world model")
        axes.plot(
            horizon, curves[f"repeat_{name}"], color=BASELINE_COLOUR, marker=".", label="last frame of the context"
        )
        if f"reconstruction_{name}" in curves:
            ceiling = curves[f"reconstruction_{name}"]
            axes.plot(horizon, ceiling, color=BASELINE_COLOUR, linestyle="--", label="true latents, decoded")
        axes.set(xlabel="frames after the context", ylabel=label, title=f"{label}: {better} is better")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _png(figure)


def drift_chart(drift: Drift, metric: str) -> bytes:
    """Plot the distance to true frames against the duration of the rollout, as PNG."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    ends = [drift.segment * (number + 1) for number in range(len(drift.distances))]
    axes.plot(ends, drift.distances, color=MODEL_COLOUR, marker="o", label="generated frames")
    axes.axhline(drift.true, color=BASELINE_COLOUR, linestyle="--", label="true frames of the first segment")
    axes.set(
        xlabel=f"frames since the context (segments of {drift.segment})",
        ylabel=metric,
        title=f"Drift: last over first segment {drift.ratio:.2f}",
        xlim=(0, ends[-1] * 1.03),
        ylim=(0, max(*drift.distances, drift.true) * 1.1),
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="best")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    with matplotlib.rc_context({"font.size": 10}):
        FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def strip(clips: Clips, count: int = STRIP_CLIPS) -> np.ndarray:
    """Draw clips at the horizons 1, 2, 4, ...: the true frames in one row, the generated ones below.

    The first column is the last frame of the context.

    Args:
        clips: Rollouts.
        count: Maximum number of rollouts, evenly spaced.

    Returns:
        uint8[height, width, 3], RGB.
    """
    horizons = [h for h in HORIZONS if h <= clips.horizon]
    chosen = evenly_spaced(len(clips.true), count)
    tile = tile_size(clips.true.shape[-2], clips.true.shape[-1], STRIP_WIDTHS)
    font = ImageFont.load_default(STRIP_FONT)
    margin = round(font.getlength("generated")) + 2 * GAP
    step = (tile[0] + GAP, tile[1] + GAP)
    block = 2 * step[0] + GAP
    picture = Image.new("RGB", (margin + (len(horizons) + 1) * step[1], CAPTION + len(chosen) * block), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    captions = ["context", *(f"{h} frame{'s' if h > 1 else ''} later" for h in horizons)]
    for column, caption in enumerate(captions):
        pen.text((margin + column * step[1], CAPTION / 2), caption, fill=TEXT, font=font, anchor="lm")
    for number, clip in enumerate(chosen):
        shown = [clips.context - 1, *(clips.context + h - 1 for h in horizons)]
        rows = (
            ("true", FAINT, margin, clips.true[clip, shown]),
            ("generated", GENERATED, margin + step[1], clips.generated[clip, [h - 1 for h in horizons]]),
        )
        for row, (name, colour, left, frames) in enumerate(rows):
            top = CAPTION + number * block + row * step[0]
            pen.text((margin - GAP, top + tile[0] / 2), name, fill=colour, font=font, anchor="rm")
            picture.paste(Image.fromarray(tile_row(frames.movedim(1, -1).numpy(), tile)), (left, top))
    return np.asarray(picture)


def comparison_film(clips: Clips, buttons: list[str], axes: list[str]) -> Iterator[np.ndarray]:
    """Yield pictures of true and generated clips side by side, one clip after another, with the controls below."""
    scales = axis_scales(clips.axes)
    panel: ControlsPanel | None = None
    shown = shown_clips(clips)
    count = len(shown)
    for number, clip in enumerate(shown):
        for t in range(clips.true.shape[1]):
            h = t - clips.context
            given = h < 0
            true = clips.true[clip, t]
            left = captioned(enlarged(as_array(true)), f"true   clip {number + 1} of {count}")
            right = captioned(
                enlarged(as_array(true if given else clips.generated[clip, h])),
                f"context, frame {t + 1} of {clips.context}" if given else f"generated, frame {h + 1}",
                FAINT if given else GENERATED,
            )
            pair = beside([left, right], 2)
            if panel is None:
                panel = ControlsPanel(buttons, axes, scales, pair.shape[1])
            yield np.concatenate([pair, panel.draw(clips.buttons[clip, t].numpy(), clips.axes[clip, t].numpy())])


def comparison_sound(clips: Clips) -> Iterator[np.ndarray]:
    """Yield the sound of each picture of `comparison_film`, float[2, n]: true on the left, generated on the right."""
    if clips.sound is None:
        return
    for clip in shown_clips(clips):
        for t in range(clips.true.shape[1]):
            true = clips.sound.true[clip, t].mean(0)
            generated = true if t < clips.context else clips.sound.generated[clip, t - clips.context].mean(0)
            yield np.stack([true.numpy(), generated.numpy()])


def shown_clips(clips: Clips) -> list[int]:
    """Return the clips of `comparison_film`, evenly spaced."""
    return evenly_spaced(len(clips.true), FILM_CLIPS)


def rollout_film(
    frames: Iterable[tuple[Tensor, Batch]], buttons: list[str], axes: list[str], scales: list[float], fps: float
) -> Iterator[np.ndarray]:
    """Yield pictures of rollouts side by side, with the controls below each.

    Args:
        frames: From `owl.rollout.evaluation.long_rollout`.
        buttons: Names.
        axes: Names.
        scales: For each axis, the movement that fills its bar.
        fps: Frames per second.
    """
    panel: ControlsPanel | None = None
    for number, (generated, given) in enumerate(frames, 1):
        tiles = []
        for row, frame in enumerate(generated):
            picture = enlarged(as_array(frame))
            if panel is None:
                panel = ControlsPanel(buttons, axes, scales, picture.shape[1])
            controls = panel.draw(given["buttons"][row].numpy(), given["axes"][row].numpy())
            tiles.append(np.concatenate([captioned(picture, f"frame {number}   {number / fps:.1f} s"), controls]))
        yield beside(tiles, ceil(sqrt(len(tiles))))


def axis_scales(axes: Tensor) -> list[float]:
    """Return the movement that fills the bar of each axis: the largest in float[..., number of axes], never 0."""
    return axes.abs().flatten(0, -2).amax(0).clamp(min=1e-6).tolist()
