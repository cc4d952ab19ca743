"""Decoders on the latents that a world model generates: metrics, and the content of a page."""

import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from owl.atomic import atomic_write
from owl.comparison.decoders import decode_all
from owl.comparison.metrics import FLICKER, ComparisonMetrics
from owl.losses.lpips import LPIPS
from owl.metrics.flicker import Flicker
from owl.metrics.frechet import FrechetDistance
from owl.pixels import to_float
from owl.rollout.episodes import as_bytes
from owl.rollout.evaluation import Clips
from owl.version import code_version
from owl.viz.comparison import TRUTH, Column, ShownClip, figure, find_detail, page

MEASURED = 256
"""Maximum number of frames on which decoders are measured, evenly spaced in time."""
SHOWN = 4
"""Number of rollouts on the page."""
NOTES = [
    "Each column compares decoded frames with the true ones: of latents that the world model generated, and of true "
    "latents. A game has many possible futures, so generated frames differ from the true ones with any decoder; the "
    "Fréchet distance compares their distributions.",
    "Flicker is the energy of fine detail that changes from frame to frame, decoded minus true; blur makes it "
    "negative.",
]


def measure_on_rollouts(decoders: dict[str, nn.Module], clips: Clips, lpips: LPIPS) -> dict[str, dict[str, float]]:
    """Measure decoders on generated latents, and on the true latents of the same frames, against the true frames.

    Args:
        decoders: By name.
        clips: Rollouts.
        lpips: The perceptual distance.

    Returns:
        By decoder: ``psnr``, ``ssim``, LPIPS and the Frechet distance by their names, all of at most `MEASURED` frames,
        and ``flicker`` (`owl.metrics.flicker.Flicker`, less than 0 for blur) of clips of at least two frames; with the
        suffix ``_true`` those of the true latents.
    """
    device = lpips.shift.device
    every = -(-clips.future.shape[:2].numel() // MEASURED)
    values: dict[str, dict[str, float]] = {name: {} for name in decoders}
    for suffix, latents in (("", clips.latents["video"]), ("_true", clips.true_latents["video"])):
        metrics = ComparisonMetrics(list(decoders), lpips)
        flickers = {name: Flicker().to(device) for name in decoders}
        title = "decoders on true latents" if suffix else "decoders on generated latents"
        for latent, frames in tqdm(list(zip(latents, clips.future, strict=True)), title, unit="clip"):
            true, decoded = to_float(frames.to(device)), decode_all(decoders, latent)
            metrics.update({name: images[::every] for name, images in decoded.items()}, true[::every])
            for name, images in decoded.items():
                if clips.horizon > 1:
                    flickers[name].update((images[None] + 1) / 2, (true[None] + 1) / 2)
        for name, found in metrics.compute().items():
            if clips.horizon > 1:
                found[FLICKER] = float(flickers[name].compute()["flicker"])
            values[name] |= {f"{metric}{suffix}": value for metric, value in found.items()}
    return values


def columns(lpips: LPIPS) -> list[Column]:
    """Return the columns of the table for the values of `measure_on_rollouts`."""
    found = []
    for suffix, kind in (("", "generated"), ("_true", "true latents")):
        found += [
            Column(f"{lpips.name}{suffix}", f"LPIPS, {kind}", 3, "lower"),
            Column(f"{FrechetDistance.name}{suffix}", f"Fréchet, {kind}", 1, "lower", "distance"),
            Column(f"{FLICKER}{suffix}", f"flicker, {kind}", 1, "", "1e-6", 1e6),
        ]
    return found


def flat(values: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the values of `measure_on_rollouts` by names such as ``decoder_<name>_psnr``."""
    return {f"decoder_{name}_{metric}": value for name, row in values.items() for metric, value in row.items()}


def section(values: dict[str, dict[str, float]], lpips: LPIPS) -> str:
    """Return the section of a Markdown report."""
    shown = [column for column in columns(lpips) if column.name in next(iter(values.values()))]
    heads = [f"{column.label} ({column.unit})" if column.scale != 1 else column.label for column in shown]
    lines = [f"| decoder | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(shown)]
    for name, row in values.items():
        lines.append(f"| {name} | {' | '.join(column.text(row[column.name]) for column in shown)} |")
    text = (
        f"The rollouts above and below are decoded by {next(iter(values))}. This table has all decoders on the same "
        "generated latents, and on the true latents of the same frames, compared with the true frames. Videos: "
        "[decoders.html](decoders.html)"
    )
    return "\n\n".join(["## Decoders", text, "\n".join(lines), "![Decoders of generated latents](decoders.png)"])


def write_page(
    out: Path,
    values: dict[str, dict[str, float]],
    shown: list[ShownClip],
    lpips: LPIPS,
    facts: dict[str, str],
    fps: float,
    command: str,
) -> None:
    """Write decoders.html and decoders.png.

    Args:
        out: Their folder.
        values: From `measure_on_rollouts`.
        shown: From `decoded_rollouts`.
        lpips: The perceptual distance.
        facts: Facts about the rollouts, by label.
        fps: Frames per second.
        command: Command line that repeats it.
    """
    text = page(
        title=f"{len(values)} decoders of generated latents",
        facts=facts | {"written": f"{time.strftime('%Y-%m-%d %H:%M')} by OWL {code_version()}"},
        columns=[column for column in columns(lpips) if column.name in next(iter(values.values()))],
        values=values,
        notes=NOTES,
        heading=f"{len(shown)} rollouts",
        clips=shown,
        fps=fps,
        command=command,
    )
    footers = {name: f"LPIPS {row[lpips.name]:.3f}" for name, row in values.items()}
    atomic_write(out / "decoders.png", figure(shown, footers))
    atomic_write(out / "decoders.html", text)


def shown_rollouts(clips: Clips, most: int, versions: Callable[[int], dict[str, Tensor]]) -> list[ShownClip]:
    """Return evenly spaced rollouts, to be shown with the true frames.

    Args:
        clips: Rollouts.
        most: Largest number of shown rollouts.
        versions: Called with the number of a rollout; returns its generated frames, uint8[H, 3, h, w], by name.
    """
    shown = []
    for row in range(0, len(clips.true), max(1, len(clips.true) // most))[:most]:
        pictures = versions(row)
        detail = find_detail([*pictures.values()])  # the true frames differ everywhere
        source = f"rollout {row + 1}, {clips.horizon} frames after {clips.context} of context"
        shown.append(ShownClip(source, {TRUTH: clips.future[row], **pictures}, {}, detail))
    return shown


def decoded_rollouts(decoders: dict[str, nn.Module], clips: Clips) -> list[ShownClip]:
    """Return the `shown_rollouts` as decoded by each decoder; see `measure_on_rollouts`."""

    def decoded(row: int) -> dict[str, Tensor]:
        return {name: as_bytes(images) for name, images in decode_all(decoders, clips.latents["video"][row]).items()}

    return shown_rollouts(clips, SHOWN, decoded)
