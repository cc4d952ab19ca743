"""Import of footage: cut recordings into episodes and write shards (docs/how-to/own-footage.md)."""

import os
import re
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from tqdm import tqdm

from owl.data.flow import estimate_flow, flow_downscale
from owl.data.footage import OWL_CONTROL, VIDEOS, Footage, Recording, find_footage
from owl.data.jobs import Frames, ShardJob, local_folder, run
from owl.data.modalities.audio import Audio
from owl.data.modalities.controls import Controls
from owl.data.modalities.flow import Flow
from owl.data.modalities.rgb import Rgb
from owl.data.owl_control import align, describe_controls, order_buttons, read_inputs
from owl.data.shards import DatasetInfo, ShardIndex
from owl.data.splits import split_in_order, split_recordings
from owl.data.video import CHANNELS, SAMPLE_RATE, AudioTrack, first_sample, read_frames, to_picture
from owl.errors import OwlError
from owl.version import code_version

EPISODE_FRAMES = 500
"""Long recordings are cut into episodes of at least this many frames and fewer than twice as many."""
SHORTEST_EPISODE = 16
"""Least frames of an episode if one or two recordings are cut shorter, for about 20 episodes."""
SHARD_FRAMES = 2000


@dataclass(frozen=True)
class Episode:
    """A section of one recording: ``frames`` frames of the constant-rate grid from ``first`` on."""

    name: str
    recording: Recording
    first: int
    frames: int


@dataclass(frozen=True)
class Imported:
    """Result of an import.

    Attributes:
        info: The dataset's description.
        footage: The recordings found.
        episodes: Frames of each written episode, by name.
        recording_of: Name of the recording of each of these episodes.
        problems: Non-fatal problems of imported recordings, by name.
    """

    info: DatasetInfo
    footage: Footage
    episodes: dict[str, int]
    recording_of: dict[str, str]
    problems: dict[str, list[str]]


def import_footage(
    source: str | Path,
    directory: str | Path,
    *,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    flow: bool = False,
    audio: bool = True,
) -> Imported:
    """Write a dataset from a folder of videos or of OWL Control recordings.

    Unusable recordings are skipped with a warning that names them. A killed import continues when it is called again
    with the same arguments (`owl.data.jobs.run`).

    Args:
        source: The folder, or one video file.
        directory: Local folder for the dataset.
        size: (H, W) of the stored frames; None uses the size of the first recording.
        fps: Frames per second; None uses the rate of the first recording.
        flow: Whether to compute optical flow.
        audio: Whether to keep sound, if any recording has it.

    Raises:
        OwlError: As `run`; or the folder contains no usable recording.
    """
    root = local_folder(directory)
    if root.resolve() == Path(source).resolve():
        raise OwlError("footage.is-dataset", f"{directory} is the footage itself; give another folder for the dataset")
    with tqdm(desc="look through", unit="recording", leave=False) as progress:
        footage = find_footage(source, root, progress.update)
    for name, reason in footage.skipped.items():
        warnings.warn(f"{name} is left out: {reason}", stacklevel=2)
    first = footage.recordings[0].video
    size = size or first.size
    rate = Fraction(fps).limit_denominator(1001) if fps else first.rate
    if flow:  # raises an error for a size that is too small before anything is written
        black = np.zeros((*size, 3), np.uint8)
        estimate_flow(black, black, flow_downscale(size))
    job = _ImportJob(footage, size, rate, flow, audio)
    info = run(job, root)
    index = ShardIndex.load(root)
    written = {str(name): int(frames) for name, frames in zip(index.episodes, index.episode_frames, strict=True)}
    of = {episode.name: episode.recording.name for episode in job.episodes}
    planned = _frames_of_recordings({episode.name: episode.frames for episode in job.episodes}, of)
    problems = {recording.name: list(recording.problems) for recording in footage.recordings}
    for name, frames in _frames_of_recordings(written, of).items():
        if frames < planned[name]:
            problems[name].append(f"only {frames} of its {planned[name]} frames can be decoded")
    for name, clauses in problems.items():
        if clauses:
            warnings.warn(f"{name}: {'; '.join(clauses)}", stacklevel=2)
    return Imported(info, footage, written, {name: of[name] for name in written}, problems)


def cut_episodes(recordings: list[Recording], fps: Fraction) -> list[Episode]:
    """Cut recordings into episodes of about equal length; every frame is in exactly one.

    One or two recordings with at least three frames give at least three episodes, so that no split is empty.
    """
    frames = [_usable_frames(recording, fps) for recording in recordings]
    length = EPISODE_FRAMES
    if len(recordings) < 3:
        length = min(length, max(SHORTEST_EPISODE, sum(frames) // 20))
        while length > 1 and sum(max(1, n // length) for n in frames) < 3:
            length -= 1
    episodes = []
    for number, (recording, count) in enumerate(zip(recordings, frames, strict=True)):
        pieces = max(1, count // length)
        cuts = [count * piece // pieces for piece in range(pieces + 1)]
        episodes += [
            Episode(f"{_slug(number, recording)}-{piece:04d}", recording, cuts[piece], cuts[piece + 1] - cuts[piece])
            for piece in range(pieces)
        ]
    return episodes


def _usable_frames(recording: Recording, fps: Fraction) -> int:
    frames = recording.video.frames(fps)
    if recording.logged < recording.video.seconds:
        frames = min(frames, int(recording.logged * fps) + 1)
    return frames


def _slug(number: int, recording: Recording) -> str:
    """Return the number and the shortened name, with characters that are valid on every file system."""
    stem = recording.name if recording.inputs else recording.name.rpartition(".")[0] or recording.name
    return f"{number:05d}-" + re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-")[:40]


def _splits(written: dict[str, int], episodes: list[Episode]) -> dict[str, list[str]]:
    """Split by recordings if there are three or more, otherwise by episodes in order."""
    of = {episode.name: episode.recording.name for episode in episodes if episode.name in written}
    frames = _frames_of_recordings(written, of)
    if len(frames) < 3:
        return split_in_order(list(of))
    split_of = {name: split for split, names in split_recordings(frames).items() for name in names}
    return {s: [name for name in of if split_of[of[name]] == s] for s in ("train", "validation", "test")}


def _frames_of_recordings(frames: dict[str, int], recording_of: dict[str, str]) -> dict[str, int]:
    """Sum the frames of episodes by recording."""
    sums: dict[str, int] = {}
    for name, count in frames.items():
        sums[recording_of[name]] = sums.get(recording_of[name], 0) + count
    return sums


def _modalities(footage: Footage, size: tuple[int, int], flow: bool, audio: bool) -> dict[str, dict]:
    modalities: dict[str, dict] = {"rgb": Rgb.describe()}
    if flow:
        modalities["flow"] = Flow.describe(size)
    if audio and any(recording.video.has_audio for recording in footage.recordings):
        timing = "frame t holds the sound from frame t-1 to frame t; a recording's first frame is silent"
        modalities["audio"] = Audio.describe(SAMPLE_RATE, CHANNELS, timing)
    if footage.kind == OWL_CONTROL:
        names = [name for recording in footage.recordings for name in recording.buttons]
        modalities["controls"] = describe_controls(order_buttons(names))
    return modalities


def _shards(episodes: list[Episode]) -> list[list[Episode]]:
    shards: list[list[Episode]] = [[]]
    for episode in episodes:
        if shards[-1] and sum(e.frames for e in shards[-1]) + episode.frames > SHARD_FRAMES:
            shards.append([])
        shards[-1].append(episode)
    return shards


class _ImportJob(ShardJob):
    """Recordings cut into episodes. Runs in one process: it decodes, since a recording is read from its start,
    and threads encode."""

    doing, kinds = "importing", (VIDEOS, OWL_CONTROL)

    def __init__(self, footage: Footage, size: tuple[int, int], fps: Fraction, flow: bool, audio: bool) -> None:
        self.episodes = cut_episodes(footage.recordings, fps)
        self._fps = fps
        self._source: _Source | None = None
        self._planned = dict(enumerate(_shards(self.episodes)))
        self.shards = {number: sum(e.frames for e in episodes) for number, episodes in self._planned.items()}
        self.info = DatasetInfo(
            fps=float(fps),
            size=size,
            modalities=_modalities(footage, size, flow, audio),
            splits=_splits({episode.name: episode.frames for episode in self.episodes}, self.episodes),
            source={
                "kind": footage.kind,
                "recordings": {
                    recording.name: {"bytes": recording.bytes, "episodes": _slug(number, recording) + "-*"}
                    for number, recording in enumerate(footage.recordings)
                },
            },
            code_version=code_version(),
        )

    def settings(self, info: DatasetInfo) -> dict[str, Any]:
        return {
            "footage of kind": info.source["kind"],
            "size": "x".join(map(str, info.size)),
            "fps": f"{info.fps:g}",
            "modalities": ", ".join(info.modalities),
            **{f"recording {name}": facts for name, facts in info.source["recordings"].items()},
            **info.modalities,
        }

    def frames(self, number: int) -> Frames:
        threads = os.cpu_count() or 1
        with ThreadPoolExecutor(threads) as pool:
            for episode in self._planned[number]:
                if self._source is None or self._source.recording is not episode.recording:
                    self._source = _Source(episode.recording, self.info, self._fps)
                for members in _ahead(pool, self._source.episode(episode, self.info), 4 * threads):
                    yield episode.name, members

    def describe(self, root: Path, info: DatasetInfo, index: ShardIndex) -> DatasetInfo:
        """Split the written episodes: a recording may end before an episode that its packets announced."""
        written = dict(zip(index.episodes.tolist(), index.episode_frames.tolist(), strict=True))
        return replace(info, splits=_splits(written, self.episodes))


@dataclass(frozen=True)
class _Frame:
    """The data for the members of one frame; ``previous`` is None at the start of an episode."""

    picture: av.VideoFrame
    previous: av.VideoFrame | None
    audio: np.ndarray | None
    controls: np.ndarray | None
    recording: Recording
    info: DatasetInfo

    def members(self) -> dict[str, bytes]:
        """Encode the members, in the order of the dataset's modalities."""
        aspect, size = self.recording.video.pixel_aspect, self.info.size
        rgb = to_picture(self.picture, size, aspect)
        members = {Rgb.extension: Rgb.encode(rgb)}
        if "flow" in self.info.modalities:
            downscale = self.info.modalities["flow"]["downscale"]
            flow = np.zeros((size[0] // downscale, size[1] // downscale, 2), np.float32)
            if self.previous is not None and self.previous is not self.picture:
                flow = estimate_flow(to_picture(self.previous, size, aspect), rgb, downscale)
            members[Flow.extension] = Flow.encode(flow)
        if self.audio is not None:
            members[Audio.extension] = Audio.encode(self.audio)
        if self.controls is not None:
            members[Controls.extension] = Controls.encode(self.controls)
        return members


class _Source:
    """One recording, read from the start, so that bytes do not depend on where an import was resumed."""

    def __init__(self, recording: Recording, info: DatasetInfo, fps: Fraction) -> None:
        self.recording, self._fps = recording, fps
        self._pictures = read_frames(recording.video, fps)
        self._position = 0
        self._audio = AudioTrack(recording.video) if "audio" in info.modalities else None
        self._controls: np.ndarray | None = None
        if recording.inputs is not None:
            buttons = info.modalities["controls"]["buttons"]
            frames = _usable_frames(recording, fps)
            self._controls = align(read_inputs(recording.inputs), frames, float(fps), buttons)

    def episode(self, episode: Episode, info: DatasetInfo) -> Iterator[_Frame]:
        """Yield the frames of an episode; fewer if the video cannot be decoded to the end."""
        previous = None
        while self._position < episode.first + episode.frames:
            picture, audio = next(self._pictures, None), self._next_audio()
            if picture is None:
                return
            if self._position >= episode.first:
                controls = self._controls[self._position] if self._controls is not None else None
                yield _Frame(picture, previous, audio, controls, self.recording, info)
                previous = picture
            self._position += 1

    def _next_audio(self) -> np.ndarray | None:
        """Return the sound from the previous frame to this one, as in recordings of the game."""
        if self._audio is None:
            return None
        begin, end = (first_sample(self._position + k, self._fps) for k in (-1, 0))
        return self._audio.read(end - begin) if self._position else np.zeros((end - begin, CHANNELS), np.int16)


def _ahead(pool: ThreadPoolExecutor, frames: Iterator[_Frame], depth: int) -> Iterator[dict[str, bytes]]:
    """Encode frames in the pool and yield them in order, never more than ``depth`` in memory."""
    waiting: deque[Future[dict[str, bytes]]] = deque()
    for frame in frames:
        waiting.append(pool.submit(frame.members))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
