"""Recording a dataset of a real game with several processes: one episode each, one shard an episode."""

import errno
import fcntl
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from owl.atomic import PARTIAL_SUFFIX
from owl.data import codecs, game
from owl.data.flow import FLOW_DIRECTION, FLOW_UNIT, estimate_flow, flow_downscale
from owl.data.scan import write_index
from owl.data.shards import (
    INDEX_NAME,
    INFO_NAME,
    DatasetInfo,
    ShardIndex,
    ShardWriter,
    shard_name,
    writing,
)
from owl.data.splits import HELD_OUT
from owl.data.storage import lock, open_filesystem
from owl.errors import OwlError
from owl.version import code_version

JPEG_QUALITY = 95
SHORTEST_MIXED = 100  # frames to which several scenarios may shorten episodes, so that each has enough of them
LOCK_NAME = "recording.lock"
LOCK_PATIENCE = 5.0  # seconds; the processes of a killed recording need a moment to notice


@dataclass(frozen=True)
class GameRecording:
    """What to record.

    Attributes:
        frames: Frames in total, 35 a second of play.
        size: (H, W) of the pictures.
        scenario: A scenario, as in `owl.data.game.find_scenario`, or several: as a list, or in one string with commas.
            Episodes take turns: each scenario has the same share of every split, one that is named twice a double one.
        seed: Equal seeds give equal bytes, whatever the number of workers.
        depth: Record depth maps.
        flow: Record optical flow (OpenCV's DIS) on a grid of half or a quarter of the resolution.
        audio: Record stereo sound at 44.1 kHz.
        workers: Processes; None takes one per core.
        episode_frames: Longest episode; the frames are divided evenly among as few episodes as that allows, at least
            three of each scenario, so that each split has one. Several scenarios have twenty each, so that one is 5%,
            unless these were shorter than 100 frames.
        held_out: Share of each scenario's episodes for validation, and that for test; at 0.5 none is for training.
    """

    frames: int = 20_000
    size: tuple[int, int] = (96, 160)
    scenario: str | list[str] = "deathmatch"
    seed: int = 0
    depth: bool = False
    flow: bool = False
    audio: bool = False
    workers: int | None = None
    episode_frames: int = 500
    held_out: float = HELD_OUT

    def scenarios(self) -> list[str]:
        """The scenarios by name; episode n is of the one at n modulo their number."""
        if isinstance(self.scenario, list):
            return self.scenario
        if os.path.isfile(self.scenario):  # a comma in a path separates nothing
            return [self.scenario]
        return [name.strip() for name in self.scenario.split(",")]

    def episode_lengths(self) -> list[int]:
        """Frames of each episode."""
        kinds = len(self.scenarios())
        count = max(3 * kinds, math.ceil(self.frames / self.episode_frames))
        if kinds > 1:
            count = max(count, min(math.ceil(1 / self.held_out) * kinds, self.frames // SHORTEST_MIXED))
            count = math.ceil(count / kinds) * kinds
        return [self.frames // count + (episode < self.frames % count) for episode in range(count)]


def record_game(path: str, recording: GameRecording) -> DatasetInfo:
    """Record a dataset, or finish one whose recording was interrupted; a finished one is left as it is.

    While another process records it, wait: the trials of a sweep and the nodes of a cluster all begin with this.

    Args:
        path: A local folder, made where needed.
        recording: What to record.

    Returns:
        The finished dataset's description.

    Raises:
        OwlError: A parameter is out of range, the folder cannot be written, is full, holds something else or is still
            written by the workers of a killed recording, the sound library is missing, or a process died. Complete
            shards stay, and the same call goes on from there.
    """
    filesystem, folder = open_filesystem(path)
    if not isinstance(filesystem, LocalFileSystem):
        raise OwlError(
            "dataset.not-local",
            f"{path} is not a local folder, one was expected; record there and copy the dataset afterwards",
        )
    _check(recording)
    root = Path(folder)
    if root.is_file():
        raise OwlError("dataset.not-a-folder", f"{path} is a file, a folder was expected; give another one")
    try:
        if (root / INDEX_NAME).exists():
            return _describe(root, recording)  # without a lock: the disk may be read-only
        with _alone(root):
            info = _describe(root, recording)
            with writing(root, patience=LOCK_PATIENCE):
                pass  # the workers of a recording that was killed have noticed
            if not (root / INDEX_NAME).exists():  # the other process has not finished it meanwhile
                _record_missing(root, recording)
                splits = _name_all(root, info.splits)
                if splits != info.splits:
                    info.splits = splits
                    info.save(root)
                write_index(root)
    except OSError as error:
        raise _explain(error, root) from error
    return info


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Be the only process that records here; wait while it is another. The lock goes when its process dies."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / LOCK_NAME
    while True:
        with open(path, "ab") as file:
            try:
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, root)
            except BlockingIOError:
                print(f"{root} is being recorded by another process; waiting for it", file=sys.stderr, flush=True)
                lock(file, fcntl.LOCK_EX, root)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # it is the one that the other process has removed
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def count_recorded(path: str) -> int:
    """Frames of the complete shards of a finished dataset."""
    return int(ShardIndex.load(path).episode_frames.sum())


def _check(recording: GameRecording) -> None:
    if not recording.scenarios():
        raise OwlError("arguments.empty", "scenario is an empty list, at least one name was expected; give one")
    if not 0 < recording.held_out <= 0.5:
        raise OwlError(
            "arguments.held-out",
            f"held_out is {recording.held_out}, above 0 and at most 0.5 was expected; it is the share of the "
            "validation split and that of the test split",
        )
    least = 3 * len(recording.scenarios())
    if recording.frames < least or recording.episode_frames < 1:
        raise OwlError(
            "arguments.too-small",
            f"frames is {recording.frames} and episode_frames {recording.episode_frames}, at least {least} and 1 were "
            "expected (three splits of an episode of each scenario); use larger numbers",
        )
    if recording.workers is not None and recording.workers < 1:
        raise OwlError(
            "arguments.too-small",
            f"workers is {recording.workers}, at least 1 was expected; leave it out for one per core",
        )
    if recording.seed < 0:
        raise OwlError("arguments.seed", f"seed is {recording.seed}, 0 or more was expected; use another seed")
    if min(recording.size) < 32:
        raise OwlError(
            "arguments.size",
            f"size is {recording.size[0]}x{recording.size[1]} (height x width), at least 32 of each were expected; "
            "use for example 96x160 or 360x640",
        )
    for name in recording.scenarios():
        game.find_scenario(name)
    game.check_size(recording.size)
    if recording.audio:
        game.check_audio()


def _describe(root: Path, recording: GameRecording) -> DatasetInfo:
    """Write dataset.json, or compare the one that is there with this recording."""
    if (root / INFO_NAME).exists():
        info = DatasetInfo.load(root)
        wanted = _source(recording)
        for key in wanted | info.source:
            if info.source.get(key) != wanted.get(key):
                raise OwlError(
                    "dataset.other-settings",
                    f"{root} was recorded with {key} {info.source.get(key)}, now it is {wanted.get(key)}; "
                    "use the same parameters to finish it, or another folder",
                )
        return info
    if any(root.glob("shard-*.tar")):
        raise OwlError(
            "dataset.occupied",
            f"{root} holds shards but no {INFO_NAME}, an empty folder was expected; use another folder",
        )
    info = DatasetInfo(
        fps=game.FPS,
        size=recording.size,
        modalities=_modalities(recording),
        splits=_splits(recording),
        source=_source(recording),
        code_version=code_version(),
    )
    info.save(root)
    return info


def _source(recording: GameRecording) -> dict[str, Any]:
    return {
        "kind": "vizdoom",
        "scenario": recording.scenarios() if len(recording.scenarios()) > 1 else recording.scenarios()[0],
        "frames": recording.frames,
        "episode_frames": recording.episode_frames,
        "size": list(recording.size),
        "seed": recording.seed,
        "depth": recording.depth,
        "flow": recording.flow,
        "audio": recording.audio,
        "vizdoom": metadata.version("vizdoom"),
        **(
            {"held_out": recording.held_out} if recording.held_out != HELD_OUT else {}
        ),  # older datasets have no such key
    }


def _modalities(recording: GameRecording) -> dict[str, dict]:
    modalities: dict[str, dict] = {"rgb": {"extension": "rgb.jpg", "quality": JPEG_QUALITY}}
    if recording.depth:
        modalities["depth"] = {
            "extension": "depth.png",
            "encoding": "uint8",
            "unit": "distance in steps of about 7 map units, 0 at the eye, 255 for all beyond",
            "range": [0, 255],
        }
    if recording.flow:
        modalities["flow"] = {
            "extension": "flow.png",
            "encoding": "kitti-uint16",
            "downscale": flow_downscale(recording.size),
            "unit": FLOW_UNIT,
            "direction": FLOW_DIRECTION,
        }
    if recording.audio:
        modalities["audio"] = {
            "extension": "audio.npy",
            "sample_rate": game.SAMPLE_RATE,
            "channels": game.CHANNELS,
            "timing": "frame t holds the sound of the tic from frame t-1 to frame t",
        }
    modalities["controls"] = {
        "extension": "controls.npy",
        "buttons": list(game.BUTTONS),
        "axes": list(game.AXES),
        "mirror": {"buttons": {"MOVE_LEFT": "MOVE_RIGHT", "MOVE_RIGHT": "MOVE_LEFT"}, "axes": list(game.AXES)},
        "unit": "buttons 0 or 1; mouse_x degrees turned to the right in the tic",
        "timing": "frame t holds the controls of the tic that brought frame t about from frame t-1",
    }
    return modalities


def _splits(recording: GameRecording) -> dict[str, list[str]]:
    """Episode names by split: of each scenario about 5% each for validation and test, at least one."""
    episodes, kinds = len(recording.episode_lengths()), len(recording.scenarios())
    order = np.random.default_rng((recording.seed, episodes)).permutation(episodes)
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for kind in range(kinds):
        of_kind = order[order % kinds == kind].tolist()
        held_out = max(1, min(round(recording.held_out * len(of_kind)), len(of_kind) // 2))
        parts["train"] += of_kind[2 * held_out :]
        parts["validation"] += of_kind[:held_out]
        parts["test"] += of_kind[held_out : 2 * held_out]
    return {split: [_episode_name(recording, number) for number in sorted(part)] for split, part in parts.items()}


def _scenario(recording: GameRecording, number: int) -> str:
    """What shard ``number`` holds an episode of."""
    scenarios = recording.scenarios()
    return scenarios[number % len(scenarios)]


def _episode_name(recording: GameRecording, number: int, beginning: int = 0) -> str:
    """Of what is played for shard ``number``: where a scenario ends early and begins anew, so does the episode.

    Among several scenarios an episode is called by its own too: all that shows episodes shows that.
    """
    parts = [f"episode-{number:06d}"]
    if len(recording.scenarios()) > 1:
        name = _scenario(recording, number)
        parts.append(re.sub(r"[^A-Za-z0-9_]+", "-", Path(name).stem if name.endswith(".cfg") else name))
    return "-".join([*parts, str(beginning)] if beginning else parts)


def _name_all(root: Path, splits: dict[str, list[str]]) -> dict[str, list[str]]:
    """Put the episodes that begin anew into the split of the one that they go on from."""
    of: dict[str, list[str]] = {}
    for shard in sorted(root.glob("shard-*.tar")):
        with tarfile.open(shard) as file:
            names = list(dict.fromkeys(name.rpartition("/")[0] for name in file.getnames()))
        of[names[0]] = names
    return {split: [name for first in firsts for name in of.get(first, [])] for split, firsts in splits.items()}


def _record_missing(root: Path, recording: GameRecording) -> None:
    lengths = recording.episode_lengths()
    missing = [number for number in range(len(lengths)) if not (root / shard_name(number)).exists()]
    if not missing:
        return
    workers = min(len(missing), recording.workers or len(os.sched_getaffinity(0)))
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the caller's threads
    # a count for each episode: a lock around a common one would stay locked for ever if its holder were killed
    recorded, stop = context.RawArray("q", len(lengths)), context.Event()
    done = sum(lengths) - sum(lengths[number] for number in missing)
    with (
        _scratch_folder(root) as scratch,
        tqdm(total=sum(lengths), initial=done, unit="frame", desc="recording") as bar,
        ProcessPoolExecutor(workers, context, _start_worker, (recorded, stop, os.getpid(), scratch)) as pool,
    ):
        pending: set[Future] = {
            pool.submit(_record_episode, str(root), recording, number, lengths[number]) for number in missing
        }
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                bar.update(done + sum(recorded) - bar.n)
                for future in finished:
                    future.result()
        except BrokenProcessPool as error:
            raise OwlError(
                "worker.killed",
                f"a process that recorded {root} was killed, perhaps for want of memory; "
                "complete shards are kept, run the same command again to go on, with fewer workers if memory is short",
            ) from error
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _scratch_folder(root: Path) -> Iterator[str]:
    """Where the workers' games keep their files; at the end whatever killed workers left is cleared away."""
    with tempfile.TemporaryDirectory(prefix="owl-game-") as scratch:
        try:
            yield scratch
        finally:
            game.end_games(scratch)
            for partial in root.glob(f"shard-*{PARTIAL_SUFFIX}"):
                partial.unlink(missing_ok=True)


# What follows runs in the worker processes.

_recorded: Any = None  # shared with the parent: frames so far of each episode
_stop: Any = None  # shared with the parent: set when the recording is over or has failed


class _StoppedError(Exception):
    """The parent wants no more; the shard is discarded."""


def _start_worker(recorded: Any, stop: Any, parent: int, scratch: str) -> None:
    global _recorded, _stop
    _recorded, _stop = recorded, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which says stop
    cv2.setNumThreads(1)  # the cores are busy with the other workers
    tempfile.tempdir = scratch
    # a game that inherited the pipe whose end tells the parent of this process's death would keep that from it
    for descriptor in os.listdir("/dev/fd"):
        with suppress(OSError):  # the listing's own descriptor is closed by now
            os.set_inheritable(int(descriptor), int(descriptor) <= 2)
    threading.Thread(target=_die_with, args=(parent, scratch), daemon=True).start()


def _die_with(parent: int, scratch: str) -> None:
    """End this process and its game when the parent is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(0.2)
    game.end_games(scratch)
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


def _record_episode(root: str, recording: GameRecording, number: int, frames: int) -> None:
    seed = int(np.random.SeedSequence((recording.seed, number)).generate_state(1)[0])
    scenario = _scenario(recording, number)
    frames_played = game.play(scenario, frames, recording.size, seed, depth=recording.depth, audio=recording.audio)
    previous: np.ndarray | None = None
    downscale = flow_downscale(recording.size)
    loudest, beginnings, first = 0, 0, 0
    with writing(root, shared=True, patience=LOCK_PATIENCE), ShardWriter(root, number) as writer:
        for position, frame in enumerate(frames_played):
            if _stop.is_set():
                raise _StoppedError
            if frame.cut and position:
                beginnings, first = beginnings + 1, position
            members = {"rgb.jpg": codecs.encode_rgb(frame.rgb, JPEG_QUALITY)}
            if frame.depth is not None:
                members["depth.png"] = codecs.encode_depth(frame.depth)
            if recording.flow:
                origin = frame.rgb if previous is None or frame.cut else previous
                members["flow.png"] = codecs.encode_flow(estimate_flow(origin, frame.rgb, downscale))
                previous = frame.rgb
            if frame.audio is not None:
                members["audio.npy"] = codecs.encode_array(frame.audio)
                loudest = max(loudest, int(np.abs(frame.audio.astype(np.int32)).max()))
            members["controls.npy"] = codecs.encode_array(np.concatenate([frame.buttons, frame.axes]))
            writer.write(_episode_name(recording, number, beginnings), position - first, members)
            _recorded[number] = position + 1
        if recording.audio and loudest == 0:
            raise OwlError(
                "game.silent",
                f"{_episode_name(recording, number)} of {scenario} is silent from beginning to end, sound was "
                "expected; reinstall libopenal1 or record without --audio",
            )


def _explain(error: OSError, root: Path) -> OwlError:
    kept = "complete shards are kept, and the same command goes on from there"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OwlError("dataset.unwritable", f"the disk of {root} is full ({error.strerror}); make room: {kept}")
    return OwlError(
        "dataset.unwritable", f"{root} cannot be written ({error}); use a folder that can be written: {kept}"
    )
