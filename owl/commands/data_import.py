"""``python -m owl data import``: convert your own footage to a dataset."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from owl.cli.arguments import parse_size
from owl.cli.datasets import print_inspect, printed_warnings
from owl.data.importer import Imported, import_footage
from owl.errors import OwlError

MOST_ROWS = 20
"""Maximum number of listed recordings; all remarks are shown."""


def main(
    source: str,
    directory: str,
    *,
    size: str | None = None,
    fps: float | None = None,
    flow: bool = False,
    audio: bool = True,
) -> None:
    """Convert your own footage to a dataset: a folder of videos, or of OWL Control recordings with their inputs.

    If the folder contains an inputs.csv, each subfolder with recording.mp4 and inputs.csv becomes a recording with
    controls; otherwise every video that FFmpeg can read is imported, with its sound, from all subfolders. Empty or
    broken recordings are skipped, truncated ones are imported as far as they can be read, and both are listed. Long
    recordings are split into episodes. With three recordings or more, whole recordings are held out for validation and
    test (5 per cent each); with fewer, their last episodes.

    After an interruption or a full disk, run the same command again: complete shards are kept.

    Args:
        source: Folder of videos or of OWL Control recordings, or one video file.
        directory: Local folder for the dataset; created if missing.
        size: Height x width of the pictures, e.g. 96x160; default: that of the first video. Videos with another aspect
            ratio are scaled to cover it and cropped around the centre.
        fps: Frames per second; default: that of the first video. Frames of videos with another or a variable rate are
            repeated or dropped.
        flow: Also compute optical flow (OpenCV's DIS, on a grid of half or a quarter of the resolution).
        audio: Import the sound, as stereo at 44.1 kHz; videos without an audio track are silent.
    """
    height_width = parse_size(size) if size is not None else None
    if fps is not None and not 0 < fps <= 1000:
        raise OwlError("arguments.fps", f"--fps is {fps:g}, expected a number above 0 and up to 1000; correct it")
    with printed_warnings():
        imported = import_footage(source, directory, size=height_width, fps=fps, flow=flow, audio=audio)
    console = Console()
    for table in _summary(imported):
        console.print(table)
    frames = sum(imported.episodes.values())
    print(
        f"{directory}: {frames:,} frames, {frames / imported.info.fps:.1f} s at {imported.info.fps:.4g} frames/s, "
        f"{imported.info.size[0]}x{imported.info.size[1]}, {', '.join(imported.info.modalities)}"
    )
    print_inspect(directory)


def _summary(imported: Imported) -> list[Table]:
    """Return tables of the results for each recording, with remarks on incomplete ones."""
    table = Table(title="recordings", title_justify="left")
    table.add_column("recording", overflow="fold")
    table.add_column("video", style="dim")
    for column in ("seconds", "frames", "episodes"):
        table.add_column(column, justify="right")
    table.add_column("split")
    remarks = Table(title="remarks", title_justify="left")
    remarks.add_column("recording", overflow="fold")
    remarks.add_column("remark", overflow="fold", style="yellow")
    split_of = {episode: split for split, episodes in imported.info.splits.items() for episode in episodes}
    for position, recording in enumerate(imported.footage.recordings):
        for problem in imported.problems[recording.name]:
            remarks.add_row(escape(recording.name), escape(problem))
        if position >= MOST_ROWS:
            continue
        video = recording.video
        episodes = [e for e, name in imported.recording_of.items() if name == recording.name]
        table.add_row(
            escape(recording.name),
            f"{video.size[0]}x{video.size[1]}, {float(video.rate):.4g}/s, {'sound' if video.has_audio else 'silent'}",
            f"{float(video.seconds):.1f}",
            f"{sum(imported.episodes[e] for e in episodes):,}",
            f"{len(episodes):,}",
            ", ".join(dict.fromkeys(split_of[e] for e in episodes)),
        )
    if (more := len(imported.footage.recordings) - MOST_ROWS) > 0:
        table.add_row(f"[dim]and {more:,} more[/dim]")
    for name, reason in imported.footage.skipped.items():
        remarks.add_row(escape(name), f"left out: {escape(reason)}")
    return [table, remarks] if remarks.row_count else [table]
