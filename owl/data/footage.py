"""Footage on disk: which recordings a folder holds, and whether each can be used."""

import contextlib
import math
import mimetypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from owl.data.media import UnreadableVideoError
from owl.data.owl_control import INPUTS_NAME, VIDEO_NAME, read_inputs
from owl.data.video import VideoFacts, probe
from owl.errors import OwlError

OTHER_FILES = ("text", "image", "audio", "font")
"""Kinds of files that are passed over in a folder of videos; all others are tried."""
OTHER_SUFFIXES = {
    ".json",
    ".csv",
    ".npz",
    ".npy",
    ".tar",
    ".zip",
    ".gz",
    ".pdf",
    ".yaml",
    ".yml",
    ".toml",
    ".srt",
    ".ini",
}
VIDEOS, OWL_CONTROL = "videos", "owl-control"


@dataclass(frozen=True)
class Recording:
    """A recording that can be used.

    Attributes:
        name: Its path below the folder that was given.
        video: What is known of the video.
        bytes: Size of its files.
        inputs: The file of inputs, None for a plain video.
        buttons: Names of the buttons that occur in it.
        logged: Seconds from the first frame up to which inputs are known.
        problems: What was wrong but survived, one clause each.
    """

    name: str
    video: VideoFacts
    bytes: int
    inputs: Path | None = None
    buttons: list[str] = field(default_factory=list)
    logged: float = math.inf
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Footage:
    """All recordings of a folder.

    Attributes:
        kind: VIDEOS or OWL_CONTROL.
        recordings: Those that can be used, by name.
        skipped: Why each of the others cannot, by name.
    """

    kind: str
    recordings: list[Recording]
    skipped: dict[str, str]


def find_footage(source: str | Path, leave_out: Path, progress: Callable[[], object] = lambda: None) -> Footage:
    """Look through a folder of videos or of OWL Control recordings; the first ``inputs.csv`` tells the latter.

    Args:
        source: The folder, searched with all its subfolders, or one video file.
        leave_out: A folder that is not searched even if it lies inside.
        progress: Called after each recording.

    Raises:
        OwlError: There is no such folder, or nothing in it can be used.
    """
    root = Path(source)
    if not root.exists():
        raise OwlError("footage.missing", f"there is no {source}; give a folder of videos or of OWL Control recordings")
    files = _list_files(root, leave_out)
    kind = OWL_CONTROL if any(path.name == INPUTS_NAME for path in files) else VIDEOS
    skipped: dict[str, str] = {}
    examine: Callable[[Path, str], Recording]
    if kind == OWL_CONTROL:
        folders = {path.parent for path in files if path.name in (INPUTS_NAME, VIDEO_NAME)}
        candidates = sorted(folders)
        for path in files:
            if path.parent not in folders and _may_be_video(path):
                skipped[_name(path, root)] = f"it is no OWL Control recording (no {INPUTS_NAME} beside it)"
        examine = _examine_folder
    else:
        candidates = [path for path in files if path == root or _may_be_video(path)]
        examine = _examine_video

    def attempt(path: Path) -> Recording | str:
        try:
            return examine(path, _name(path, root))
        except (UnreadableVideoError, ValueError) as error:
            return str(error)
        except OSError as error:
            return f"it cannot be read ({error.strerror})"
        finally:
            progress()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(attempt, candidates))
    recordings = [result for result in found if isinstance(result, Recording)]
    reasons = [result for result in found if isinstance(result, str)]
    names = [_name(path, root) for path, result in zip(candidates, found, strict=True) if isinstance(result, str)]
    skipped |= dict(zip(names, reasons, strict=True))
    if not recordings:
        first = next((f"; {name}: {reason}" for name, reason in skipped.items()), "")
        count = f"none of the {len(candidates)} recordings" if candidates else "nothing"
        raise OwlError(
            "footage.unusable",
            f"{count} in {source} can be used{first}; give a folder of videos or of OWL Control recordings "
            f"({VIDEO_NAME} and {INPUTS_NAME} in a folder each)",
        )
    return Footage(kind, recordings, dict(sorted(skipped.items())))


def _examine_video(path: Path, name: str) -> Recording:
    facts = probe(path)
    return Recording(name, facts, path.stat().st_size, problems=list(facts.problems))


def _examine_folder(folder: Path, name: str) -> Recording:
    video, inputs = folder / VIDEO_NAME, folder / INPUTS_NAME
    for path in (video, inputs):
        if not path.is_file():
            raise ValueError(f"it has no {path.name}")
    events, facts = read_inputs(inputs), probe(video)
    problems = events.problems + facts.problems
    if events.logged < 0:
        raise ValueError(f"{INPUTS_NAME} ends before the video starts")
    if events.logged < facts.seconds:
        problems.append(
            f"{INPUTS_NAME} breaks off after {events.logged:.1f} of {float(facts.seconds):.1f} s, the rest is left out"
        )
    size = video.stat().st_size + inputs.stat().st_size
    return Recording(name, facts, size, inputs, events.names, events.logged, problems)


def _list_files(root: Path, leave_out: Path) -> list[Path]:
    if root.is_file():
        return [root]
    excluded = leave_out.resolve()
    files = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(s for s in subfolders if not s.startswith(".") and Path(folder, s).resolve() != excluded)
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in files if path.is_file())


def _may_be_video(path: Path) -> bool:
    if path.suffix.lower() in OTHER_SUFFIXES:
        return False
    kind = mimetypes.guess_type(path.name)[0] or "unknown"
    return kind.split("/")[0] not in OTHER_FILES or path.suffix.lower() in (".gif", ".ts")


def _name(path: Path, root: Path) -> str:
    with contextlib.suppress(ValueError):
        relative = path.relative_to(root).as_posix()
        return path.resolve().name if relative == "." else relative
    return path.name
