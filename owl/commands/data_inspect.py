"""``python -m owl data inspect``: summarise a dataset in tables and a picture."""

import io
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from owl.atomic import atomic_write
from owl.data.overview import DatasetReader, draw_contact_sheet, measure_audio, summarize_modalities, summarize_splits


def main(directory: str, *, out: str | None = None) -> None:
    """Summarise a dataset in tables and draw its contact sheet: frames over episodes and time.

    Args:
        directory: The dataset's folder, or any fsspec URL.
        out: Where to write the contact sheet (PNG); the default is NAME-contact-sheet.png in the current folder.
    """
    reader = DatasetReader(directory)
    console = Console()
    _print_tables(console, reader)
    path = Path(out or f"{Path(directory).name or 'dataset'}-contact-sheet.png")
    buffer = io.BytesIO()
    draw_contact_sheet(reader).save(buffer, "PNG")
    atomic_write(path, buffer.getvalue())
    console.print(f"contact sheet: {path}", soft_wrap=True, highlight=False, markup=False)


def _print_tables(console: Console, reader: DatasetReader) -> None:
    info, total = reader.info, reader.index.frames
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_row("dataset", f"[bold]{escape(reader.url)}[/bold]  [dim]identity {reader.identity}[/dim]")
    facts.add_row("pictures", f"{info.size[0]} x {info.size[1]} (height x width), {info.fps:g} frames/s")
    shards, size = len(reader.index.shards), int(reader.index.shard_bytes.sum())
    facts.add_row("stored", f"{_bytes(size)} in {shards} shards, {_bytes(size / max(1, total))} a frame")
    controls = info.modalities.get("controls")
    if controls:
        facts.add_row("buttons", ", ".join(controls["buttons"]) or "none")
        facts.add_row("axes", ", ".join(controls["axes"]) or "none")
    levels = measure_audio(reader)
    if levels.frames:
        facts.add_row("sound", str(levels))
    for name, description in info.modalities.items():
        if encoder := description.get("encoder"):
            facts.add_row("encoder", escape(f"{encoder['checkpoint']} ({encoder['fingerprint']}) of {name}"))
    source = ", ".join(f"{key} {value}" for key, value in info.source.items() if isinstance(value, str | int | float))
    scenarios = info.source.get("scenario")
    if isinstance(scenarios, list):
        facts.add_row("scenarios", escape(", ".join(scenarios)))
    facts.add_row("source", escape(source))
    facts.add_row("written by", f"owl {info.code_version}")

    splits = Table(title="splits", title_justify="left")
    splits.add_column("split")
    for column in ("episodes", "frames", "hours"):
        splits.add_column(column, justify="right")
    for name, split in summarize_splits(reader).items():
        splits.add_row(name, f"{split.episodes:,}", f"{split.frames:,}", f"{split.hours:.3g}")

    modalities = Table(title="modalities", title_justify="left")
    modalities.add_column("modality")
    for column in ("frames", "bytes", "a frame"):
        modalities.add_column(column, justify="right")
    modalities.add_column("encoding", style="dim")
    for name, modality in summarize_modalities(reader).items():
        mean = modality.bytes / max(1, modality.frames)
        modalities.add_row(
            name, f"{modality.frames:,}", _bytes(modality.bytes), _bytes(mean), escape(modality.description)
        )
    for part in (facts, splits, modalities):
        console.print(part)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
