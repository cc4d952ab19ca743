"""``python -m owl data import``: from your own footage to a dataset."""

import re
import shlex
import sys
import warnings

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from owl.data.importer import Imported, import_footage
from owl.errors import OwlError

MOST_ROWS = 20
"""Recordings are listed up to this many; remarks are all shown."""


def main(
    source: str,
    directory: str,
    *,
    size: str | None = None,
    fps: float | None = None,
    flow: bool = False,
    audio: bool = True,
) -> None:
    """Make a dataset of your own footage: a folder of videos, or of OWL Control recordings with their inputs.

    The folder tells which: where it holds an inputs.csv, each folder with recording.mp4 and inputs.csv becomes a
    recording with controls; otherwise every video that FFmpeg can read is taken, with its sound, from all subfolders.
    Recordings that are empty, broken or cut short are left out by name or kept as far as they go. Long ones are cut
    into episodes. With three recordings or more, whole recordings are held out for validation and test (5 per cent
    each); with fewer, their last episodes are.

    Killed or out of disk space? Run the same command again: it keeps the shards that are complete.

    Args:
        source: Folder of videos or of OWL Control recordings, or one video file.
        directory: Local folder for the dataset; made where needed.
        size: Height x width of the pictures, e.g. 96x160; the default is the first video's. Videos of another shape
            are scaled to cover it and cut about the centre, never squeezed.
        fps: Frames per second; the default is the first video's. Videos of another or a varying rate have frames
            repeated or left out.
        flow: Compute optical flow too (OpenCV's DIS, on a grid of half or a quarter of the resolution).
        audio: Keep the sound, as stereo at 44.1 kHz; videos without a sound track are silent.
    """
    height_width = _parse_size(size) if size is not None else None
    if fps is not None and not 0 < fps <= 1000:
        raise OwlError("arguments.fps", f"--fps is {fps:g}, a number above 0 and up to 1000 was expected; correct it")
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)
        imported = import_footage(source, directory, size=height_width, fps=fps, flow=flow, audio=audio)
    console = Console()
    for table in _summary(imported):
        console.print(table)
    frames = sum(imported.episodes.values())
    print(
        f"{directory}: {frames:,} frames, {frames / imported.info.fps:.1f} s at {imported.info.fps:.4g} frames/s, "
        f"{imported.info.size[0]}x{imported.info.size[1]}, {', '.join(imported.info.modalities)}"
    )
    print(f"look at it: python -m owl data inspect {shlex.quote(directory)}")


def _parse_size(size: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if not match or not all(8 <= int(side) <= 2**14 for side in match.groups()):
        raise OwlError(
            "arguments.size",
            f"--size is {size}, height x width such as 96x160 was expected (8 to 16384 each); correct it",
        )
    return int(match[1]), int(match[2])


def _summary(imported: Imported) -> list[Table]:
    """What became of each recording, and a remark on each that did not come through whole."""
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
