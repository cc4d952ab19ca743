"""Footage on disk: find the recordings of a folder and check each."""

import math
import mimetypes
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from owl.data.media import UnreadableVideoError
from owl.data.owl_control import INPUTS_NAME, INVALID_NAMES, VIDEO_NAME, read_inputs
from owl.data.video import VideoFacts, probe
from owl.errors import OwlError

OTHER_FILES = ("text", "image", "audio", "font")
"""Suffixes of files that are skipped in a folder of videos; all other files are tried."""
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
    """A usable recording.

    Attributes:
        name: Path relative to the given folder.
        video: Properties of the video.
        bytes: Total size of its files.
        inputs: Input log, None for a plain video.
        buttons: Names of the buttons that occur in it.
        logged: Seconds from the first frame up to which inputs are known.
        problems: Non-fatal problems, one clause each.
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
        recordings: Usable recordings, by name.
        skipped: Reason why a recording is skipped, by name.
    """

    kind: str
    recordings: list[Recording]
    skipped: dict[str, str]


def find_footage(source: str | Path, leave_out: Path, progress: Callable[[], object] = lambda: None) -> Footage:
    """Find the recordings of a folder of videos or OWL Control recordings; the latter contain an ``inputs.csv``.

    Args:
        source: Folder, searched recursively, or one video file.
        leave_out: Folder to exclude from the search.
        progress: Called after each recording.

    Raises:
        OwlError: The folder does not exist, or contains no usable recording.
    """
    root = Path(source)
    if not root.exists():
        raise OwlError("footage.missing", f"there is no {source}; give a folder of videos or of OWL Control recordings")
    files, unreadable = _list_files(root, leave_out)
    kind = OWL_CONTROL if any(path.name == INPUTS_NAME for path in files) else VIDEOS
    skipped = {name: reason for name, reason in unreadable.items() if _may_be_video(Path(name))}
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
    video, inputs = _find_video(folder), folder / INPUTS_NAME
    if not inputs.is_file():
        raise ValueError(f"it has no {INPUTS_NAME}")
    events, facts = read_inputs(inputs), probe(video)
    problems = events.problems + facts.problems
    if events.logged < 0:
        raise ValueError(f"{INPUTS_NAME} ends before the video starts")
    if events.logged < facts.seconds:
        problems.append(
            f"{INPUTS_NAME} ends after {events.logged:.1f} of {float(facts.seconds):.1f} s, the rest is left out"
        )
    if video.name != VIDEO_NAME:
        problems.append(f"its video is {_readable(video.name)} instead of {VIDEO_NAME}")
    for marker in INVALID_NAMES:
        if (folder / marker).is_file():
            reasons = " ".join((folder / marker).read_text("utf-8", "replace").split())[:200]
            problems.append(f"OWL Control marked it as invalid in {marker} ({reasons or 'without a reason'})")
    if (black := math.floor(events.hooked * facts.rate)) > 0:
        problems.append(f"its first {black} frames come before HOOK_START, so they are probably black")
    if abs(events.seconds - facts.seconds) > max(1.0, 0.01 * facts.seconds):  # NaN is not
        problems.append(
            f"{INPUTS_NAME} logs {events.seconds:.1f} s of video and the video has {float(facts.seconds):.1f} s, so a "
            "clock jumped or frames were lost: inputs may not match the video"
        )
    size = video.stat().st_size + inputs.stat().st_size
    return Recording(name, facts, size, inputs, events.names, events.logged, problems)


def _find_video(folder: Path) -> Path:
    """Return recording.mp4, or the only video of the folder."""
    if (usual := folder / VIDEO_NAME).is_file():
        return usual
    videos = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != "." and _may_be_video(path))
    if len(videos) > 1:
        names = ", ".join(_readable(path.name) for path in videos[:3])
        raise ValueError(f"it has no {VIDEO_NAME} and {len(videos)} other videos ({names}), expected one")
    if not videos:
        raise ValueError(f"it has no {VIDEO_NAME}")
    return videos[0]


def _list_files(root: Path, leave_out: Path) -> tuple[list[Path], dict[str, str]]:
    """List the files of a folder and its subfolders, each once even if several links point to it.

    Returns:
        The sorted files, and the reason for each folder or link that cannot be followed, by name.
    """
    if root.is_file():
        return [root], {}
    seen: set[tuple[int, int]] = set()
    unreadable: dict[str, str] = {}

    def is_new(path: Path) -> bool:
        try:
            found = path.stat()
        except OSError as error:  # a broken or circular link
            unreadable[_name(path, root)] = f"it cannot be read ({error.strerror})"
            return False
        identity = (found.st_dev, found.st_ino)
        if identity in seen or not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            return False
        seen.add(identity)
        return True

    def note(error: OSError) -> None:
        unreadable[_name(Path(error.filename), root)] = f"it cannot be read ({error.strerror})"

    files: list[Path] = []
    if leave_out.exists():
        is_new(leave_out)
    is_new(root)
    for folder, subfolders, names in os.walk(root, onerror=note, followlinks=True):
        for found in (subfolders, names):  # links last, so that they do not replace real files
            found[:] = sorted(name for name in found if name[0] != ".")
            found.sort(key=lambda name: os.path.islink(os.path.join(folder, name)))
        subfolders[:] = [name for name in subfolders if is_new(Path(folder, name))]
        files += [path for name in names if is_new(path := Path(folder, name))]
    return sorted(files), unreadable


def _may_be_video(path: Path) -> bool:
    if path.suffix.lower() in OTHER_SUFFIXES:
        return False
    kind = mimetypes.guess_type(path.name)[0] or "unknown"
    return kind.split("/")[0] not in OTHER_FILES or path.suffix.lower() in (".gif", ".ts")


def _name(path: Path, root: Path) -> str:
    relative = path.relative_to(root).as_posix()
    return _readable(path.resolve().name if relative == "." else relative)


def _readable(name: str) -> str:
    """Return a file's name as valid UTF-8 text for terminals and JSON, even if the name is not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
