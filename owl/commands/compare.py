"""``python -m owl compare``: show and measure decoders of the same latents side by side."""

import json
import shlex
import time
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from tqdm import tqdm

from owl.atomic import atomic_write
from owl.comparison.clips import HeldOutClips
from owl.comparison.decoders import check_sizes, count_parameters, decode_all, load_decoders, measure_speed, run_folder
from owl.comparison.metrics import FLICKER, ComparisonMetrics, quality
from owl.environment import devices
from owl.errors import at_least
from owl.hardware import default_device
from owl.latents import encoder_of
from owl.losses.lpips import LPIPS
from owl.metrics.frechet import FrechetDistance
from owl.pixels import to_float, to_uint8
from owl.version import code_version
from owl.viz.comparison import TRUTH, Column, ShownClip, figure, find_detail, page


def main(
    runs: list[str],
    *,
    data: str,
    out: str | None = None,
    encoder: str | None = None,
    split: Literal["train", "validation", "test"] = "test",
    clips: int = 12,
    length: int = 32,
    show: int = 4,
) -> None:
    """Decode the same held-out clips with several decoders and write a page that compares them.

    The decoders must take latents of the same encoder: an autoencoder and decoders that were trained on it. The folder
    gets index.html, which shows the clips and a table and needs no other file, comparison.png and metrics.json. A GPU
    is used if available.

    Args:
        runs: Run folders such as runs/quickstart (their last checkpoint), .ckpt files, or folders written by export.
            Speed is relative to the first.
        data: Dataset with the pictures, and possibly with latents and flow: a folder, or any fsspec URL.
        out: Folder for the results; by default "comparison" next to the first run.
        encoder: Run, checkpoint or export of the autoencoder that encodes the pictures; by default the first
            autoencoder among the runs. Without one, the latents in the dataset are decoded.
        split: Split of the clips.
        clips: Number of clips to measure, evenly spaced over the split.
        length: Frames in a clip.
        show: Number of clips on the page.
    """
    at_least(1, clips=clips, length=length, show=show)
    device = default_device()
    decoders = load_decoders(runs)
    first = next(iter(decoders.values()))
    if encoder is None:
        encoder = next((run for run, net in zip(runs, decoders.values(), strict=True) if hasattr(net, "encode")), None)
    held_out = HeldOutClips(data, split, clips, length, encoder_of(first), encoder, device)
    for decoder in decoders.values():
        decoder.to(device).requires_grad_(False)
    folder = Path(out) if out else run_folder(runs[0]).parent / "comparison"
    start = time.monotonic()
    lpips = LPIPS().to(device)
    values, shown = measure(decoders, held_out, lpips, show)
    columns = [column for column in columns_of(lpips) if column.name in values[next(iter(values))]]
    settings: dict[str, Any] = {"data": data, "out": str(folder), "encoder": encoder, "split": split}
    settings |= {"clips": clips, "length": length, "show": show}
    command = ["python", "-m", "owl", "compare", *runs]
    command += [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]
    text = page(
        title=f"{len(decoders)} decoders of the same latent" if len(decoders) > 1 else next(iter(decoders)),
        facts={
            "dataset": f"{data}, {split} split",
            "measured on": f"{len(held_out)} clips of {length} frames, {held_out.dataset.info.fps:g} frames/s",
            "latents": f"{'x'.join(map(str, held_out.latent_shape))} of encoder {encoder_of(first)}",
            "device": describe(device),
            "written": f"{time.strftime('%Y-%m-%d %H:%M')} by OWL {code_version()}",
        },
        columns=columns,
        values=values,
        notes=notes(lpips, held_out, next(iter(decoders))),
        heading=f"{len(shown)} of {len(held_out)} clips",
        clips=shown,
        fps=held_out.dataset.info.fps,
        command=shlex.join(command),
    )
    footers = {name: f"{row['psnr']:.1f} dB, LPIPS {row[lpips.name]:.3f}" for name, row in values.items()}
    footers[TRUTH] = f"all {len(held_out)} clips:"
    results = {"decoders": values, "settings": settings, "seconds": round(time.monotonic() - start, 1)}
    atomic_write(folder / "metrics.json", json.dumps(results, indent=2) + "\n")
    atomic_write(folder / "comparison.png", figure(shown, footers))
    atomic_write(folder / "index.html", text)
    print_table(f"{data}, {split} split", columns, values)
    print(f"Page: {folder / 'index.html'}")


def measure(
    decoders: dict[str, nn.Module], held_out: HeldOutClips, lpips: LPIPS, show: int
) -> tuple[dict[str, dict[str, float]], list[ShownClip]]:
    """Decode and measure all clips with all decoders, in one pass over the data.

    Returns:
        The metrics of each decoder, and evenly spaced clips to be shown.
    """
    device = lpips.shift.device
    metrics = ComparisonMetrics(list(decoders), lpips)
    every = max(1, len(held_out) // show)
    shown: list[ShownClip] = []
    progress = tqdm(held_out, "clips", unit="clip")
    for number, clip in enumerate(progress):
        if not number:
            check_sizes(decoders, clip.true, clip.latent)
            latent = clip.latent
        true, flow = to_float(clip.true.to(device)), None if clip.flow is None else clip.flow.to(device)
        decoded = decode_all(decoders, clip.latent)
        metrics.update(decoded, true, flow)
        if number % every == 0 and len(shown) < show:
            pictures = {TRUTH: clip.true} | {name: to_uint8(images).cpu() for name, images in decoded.items()}
            scores = {name: quality(images, true, lpips) for name, images in decoded.items()}
            captions = {name: f"{psnr:.1f} dB, LPIPS {distance:.3f}" for name, (psnr, distance) in scores.items()}
            shown.append(ShownClip(clip.source, pictures, captions, find_detail([*pictures.values()])))
    values, speeds = metrics.compute(), measure_speed(decoders, latent)
    return {
        name: values[name] | {"parameters": count_parameters(decoder)} | speeds[name]
        for name, decoder in decoders.items()
    }, shown


def columns_of(lpips: LPIPS) -> list[Column]:
    """Return the columns of the table."""
    return [
        Column("psnr", "PSNR", 2, "higher", "dB"),
        Column("ssim", "SSIM", 3, "higher"),
        Column(lpips.name, "LPIPS", 4, "lower"),
        Column(FrechetDistance.name, "Fréchet", 2, "lower", "distance"),
        Column(FLICKER, "flicker", 1, "lower", "1e-6", 1e6),
        Column("parameters", "parameters", 2, "lower", "million", 1e-6),
        Column("frames_per_second", "frames/s", 1, "higher", "of one core" if lpips.shift.device.type == "cpu" else ""),
        Column("speed", "speed", 2, "higher", "relative"),
    ]


def notes(lpips: LPIPS, held_out: HeldOutClips, first: str) -> list[str]:
    """Return what the columns mean."""
    frames = len(held_out) * held_out.dataset.length
    return [
        f"PSNR, SSIM and LPIPS ({lpips.name}) are means over the frames; the Fréchet distance ({FrechetDistance.name}) "
        f"compares the distributions of {frames} true and decoded frames and depends on their number.",
        "Flicker is the energy with which the fine detail of the error changes from frame to frame, other than along "
        "the optical flow.",
        f"Frames/s are of the decoder alone, one frame at a time, on a CPU with one thread; speed is relative to "
        f"{first}. The decoders are timed in turns, and the fastest frame of each counts.",
    ]


def describe(device: torch.device) -> str:
    """Return the name of a device."""
    found = devices()
    return str(found["gpus"][0]) if device.type == "cuda" else f"{found['cpu']}, {found['threads']} threads"


def print_table(title: str, columns: list[Column], values: dict[str, dict[str, float]]) -> None:
    """Print a row for each metric, with the best value in bold."""
    table = Table("metric")
    for name in values:
        table.add_column(escape(name), justify="right", overflow="fold")
    for column in columns:
        best = column.best(values)
        cells = [(column.text(row[column.name]), name in best) for name, row in values.items()]
        label = f"{column.label} ({column.unit})" if column.unit else column.label
        table.add_row(label, *(f"[bold]{text}[/bold]" if is_best else text for text, is_best in cells))
    console = Console()
    console.print(title, markup=False, soft_wrap=True)
    console.print(table)
