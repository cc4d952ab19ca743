"""Recording of a dataset from a real game with several worker processes, one episode per shard."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from owl.data import game, screen
from owl.data.jobs import Frames, ShardJob, local_folder, run
from owl.data.modalities import MODALITIES
from owl.data.modalities.base import RecordedModality
from owl.data.modalities.labels import Labels
from owl.data.reader import ShardReader, read_members
from owl.data.shards import DatasetInfo, ShardIndex
from owl.data.splits import HELD_OUT
from owl.errors import OwlError, suggestion
from owl.version import code_version

SHORTEST_MIXED = 100  # least frames of an episode when several scenarios shorten episodes
RECORDED = {name: modality for name, modality in MODALITIES.items() if issubclass(modality, RecordedModality)}
ALWAYS = ("rgb", "controls")  # of these, in every recording


@dataclass(frozen=True)
class GameRecording:
    """Settings of a recording.

    Attributes:
        frames: Total number of frames, 35 per second of play.
        size: (H, W) of the pictures.
        scenario: A scenario, as in `owl.data.game.find_scenario`, or several: as a list, or in one string with commas.
            Episodes alternate: each scenario has the same share of every split, a scenario listed twice a double share.
        seed: Equal seeds give equal bytes, for any number of workers.
        modalities: What is recorded as well as rgb and controls, in any order: depth, flow (OpenCV's DIS, on a grid of
            half or a quarter of the resolution), audio (stereo at 44.1 kHz), pose (of the camera, with its intrinsics),
            labels (the object of each pixel and its name).
        workers: Number of worker processes; None uses one per core.
        episode_frames: Largest number of frames of an episode. Frames are divided evenly among as few episodes as
            possible, with at least three per scenario, so that each split has one. Several scenarios have twenty
            episodes each, so that one is 5%, unless these were shorter than 100 frames.
        held_out: Share of each scenario's episodes for validation, and for test; at 0.5 none are for training.
    """

    frames: int = 20_000
    size: tuple[int, int] = (96, 160)
    scenario: str | list[str] = "deathmatch"
    seed: int = 0
    modalities: tuple[str, ...] = ()
    workers: int | None = None
    episode_frames: int = 500
    held_out: float = HELD_OUT

    def scenarios(self) -> list[str]:
        """Names of the scenarios; episode n uses the scenario at n modulo their number."""
        if isinstance(self.scenario, list):
            return self.scenario
        if os.path.isfile(self.scenario):  # a comma in a path is not a separator
            return [self.scenario]
        return [name.strip() for name in self.scenario.split(",")]

    def recorded(self) -> dict[str, type[RecordedModality]]:
        """Classes of all recorded modalities by name, in the order in which they are stored."""
        return {name: modality for name, modality in RECORDED.items() if name in (*ALWAYS, *self.modalities)}

    def episode_lengths(self) -> list[int]:
        """Frames of each episode."""
        kinds = len(self.scenarios())
        count = max(3 * kinds, math.ceil(self.frames / self.episode_frames))
        if kinds > 1:
            count = max(count, min(math.ceil(1 / self.held_out) * kinds, self.frames // SHORTEST_MIXED))
            count = math.ceil(count / kinds) * kinds
        return [self.frames // count + (episode < self.frames % count) for episode in range(count)]


def record_game(path: str, recording: GameRecording) -> DatasetInfo:
    """Record a dataset, or finish one whose recording was interrupted (`owl.data.jobs.run`).

    Args:
        path: A local folder, created if needed.
        recording: Settings of the recording.

    Returns:
        The finished dataset's description.

    Raises:
        OwlError: As `run`; or a parameter is out of range, or the sound library is missing.
    """
    root = local_folder(path)
    _check(recording)
    return run(RecordJob(recording), root, recording.workers or len(os.sched_getaffinity(0)))


def _check(recording: GameRecording) -> None:
    if not recording.scenarios():
        raise OwlError("arguments.empty", "scenario is an empty list, expected at least one name; give one")
    if not 0 < recording.held_out <= 0.5:
        raise OwlError(
            "arguments.held-out",
            f"held_out is {recording.held_out}, expected above 0 and at most 0.5; it is the share of the "
            "validation split and that of the test split",
        )
    least = 3 * len(recording.scenarios())
    if recording.frames < least or recording.episode_frames < 1:
        raise OwlError(
            "arguments.too-small",
            f"frames is {recording.frames} and episode_frames {recording.episode_frames}, expected at least "
            f"{least} and 1 (three splits with an episode of each scenario); use larger numbers",
        )
    if recording.seed < 0:
        raise OwlError("arguments.seed", f"seed is {recording.seed}, expected 0 or more; use another seed")
    check_available(recording)


def check_available(recording: GameRecording) -> None:
    """Check what random and played games have in common: modalities, workers, size, scenarios and sound.

    Raises:
        OwlError: There are no workers, or the modalities, the scenarios, the size or the sound are not available.
    """
    for name in recording.modalities:
        if name not in RECORDED:
            raise OwlError(
                "game.modality",
                f"modality '{name}' cannot be recorded from the game, expected some of {', '.join(RECORDED)}"
                f"{suggestion(name, RECORDED) or '; choose from these'}",
            )
    if recording.workers is not None and recording.workers < 1:
        raise OwlError(
            "arguments.too-small",
            f"workers is {recording.workers}, expected at least 1; leave it out for one per core",
        )
    if min(recording.size) < 32:
        raise OwlError(
            "arguments.size",
            f"size is {recording.size[0]}x{recording.size[1]} (height x width), expected at least 32 each; "
            "use for example 96x160 or 360x640",
        )
    for name in recording.scenarios():
        game.find_scenario(name)
    game.check_size(recording.size)
    if any("audio" in modality.buffers for modality in recording.recorded().values()):
        game.check_audio()


class RecordJob(ShardJob):
    """Recording job: one episode per shard, each played by a separate game process."""

    doing, kinds = "recording", ("vizdoom",)

    def __init__(self, recording: GameRecording) -> None:
        self.recording = recording
        self.shards = dict(enumerate(recording.episode_lengths()))
        self.info = DatasetInfo(
            fps=game.FPS,
            size=recording.size,
            modalities=describe_modalities(recording),
            splits=_splits(recording),
            source=describe_source(recording),
            code_version=code_version(),
        )

    def settings(self, info: DatasetInfo) -> dict[str, Any]:
        return info.source

    def frames(self, number: int) -> Frames:
        recording, modalities = self.recording, self.recording.recorded()
        previous: game.Frame | None = None
        loudest, beginnings = 0, 0
        for position, frame in enumerate(self.play(number)):
            if position and self.starts_episode(position, frame):
                beginnings += 1
            before = frame if previous is None or frame.cut else previous
            values = {name: modality.record(frame, before) for name, modality in modalities.items()}
            if "audio" in values:
                loudest = max(loudest, int(np.abs(values["audio"].astype(np.int32)).max()))
            members = {modality.extension: modality.encode(values[name]) for name, modality in modalities.items()}
            yield episode_name(recording, number, beginnings), members
            previous = frame
        if "audio" in modalities and loudest == 0:
            raise OwlError(
                "game.silent",
                f"{episode_name(recording, number)} of {scenario_of(recording, number)} is silent from beginning to "
                "end, sound was expected; reinstall libopenal1 or record without --audio",
            )

    def play(self, number: int) -> Iterator[game.Frame]:
        """Play the game of a shard."""
        recording, modalities = self.recording, self.recording.recorded().values()
        return game.play(
            scenario_of(recording, number),
            self.shards[number],
            recording.size,
            self.seed(number),
            buffers=[name for modality in modalities for name in modality.buffers],
            variables=[name for modality in modalities for name in modality.variables],
            policy=self.policy(number),
        )

    def seed(self, number: int) -> int:
        """Return the seed of the game of a shard."""
        return int(np.random.SeedSequence((self.recording.seed, number)).generate_state(1)[0])

    def policy(self, number: int) -> game.Policy | None:
        """Return what plays the game of a shard; None: random actions."""
        return None

    def starts_episode(self, position: int, frame: game.Frame) -> bool:
        """Return whether a frame of a shard after its first one starts another episode."""
        return frame.cut

    def is_described(self, info: DatasetInfo) -> bool:
        return "labels" not in info.modalities or "names" in info.modalities["labels"]

    def describe(self, root: Path, info: DatasetInfo, index: ShardIndex) -> DatasetInfo:
        """Put the episodes after a restart into the split of the episode before it; list the names of the labels."""
        names: dict[int, list[str]] = {}
        for shard, name in zip(index.episode_shard.tolist(), index.episodes.tolist(), strict=True):
            names.setdefault(shard, []).append(name)
        of = {first: [first, *others] for first, *others in names.values()}
        splits = {
            split: [name for first in firsts for name in of.get(first, [])] for split, firsts in info.splits.items()
        }
        return replace(info, splits=splits, modalities=named_labels(root, info, index))

    @staticmethod
    def clean_up(scratch: str) -> None:
        game.end_games(scratch)


def describe_source(recording: GameRecording) -> dict[str, Any]:
    """Return the settings that decide the bytes of a recording, for dataset.json."""
    return {
        "kind": "vizdoom",
        "scenario": recording.scenarios() if len(recording.scenarios()) > 1 else recording.scenarios()[0],
        "frames": recording.frames,
        "episode_frames": recording.episode_frames,
        "size": list(recording.size),
        "seed": recording.seed,
        # older datasets have these keys where they are false, and no others
        **dict.fromkeys(("depth", "flow", "audio"), False),
        **{name: True for name in recording.recorded() if name not in ALWAYS},
        **({"held_out": recording.held_out} if recording.held_out != HELD_OUT else {}),
        "vizdoom": game.installed_version(),
    }


def named_labels(root: Path, info: DatasetInfo, index: ShardIndex) -> dict[str, dict]:
    """Return the modalities of a dataset, with the names of the labels if it has labels."""
    if "labels" not in info.modalities:
        return info.modalities
    return {**info.modalities, "labels": {**info.modalities["labels"], "names": _label_names(root, index)}}


def _label_names(root: Path, index: ShardIndex) -> list[str]:
    """Return all names in the labels of a dataset, sorted."""
    reader, found = ShardReader(root, None, ""), set(screen.LABEL_NAMES.values())
    for episode, frames in enumerate(index.episode_frames.tolist()):
        members, _ = read_members(reader, index, episode, range(frames), [Labels.extension])
        found.update(name for member in members for name in Labels.read_names(member[Labels.extension]).values())
    return sorted(found)


def describe_modalities(recording: GameRecording) -> dict[str, dict]:
    """Return the description of the modalities of a recording, for dataset.json."""
    return {name: modality.describe_recorded(recording.size) for name, modality in recording.recorded().items()}


def _splits(recording: GameRecording) -> dict[str, list[str]]:
    """Return episode names by split, with ``held_out`` of each scenario for validation and for test, at least one."""
    episodes, kinds = len(recording.episode_lengths()), len(recording.scenarios())
    order = np.random.default_rng((recording.seed, episodes)).permutation(episodes)
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for kind in range(kinds):
        of_kind = order[order % kinds == kind].tolist()
        held_out = max(1, min(round(recording.held_out * len(of_kind)), len(of_kind) // 2))
        parts["train"] += of_kind[2 * held_out :]
        parts["validation"] += of_kind[:held_out]
        parts["test"] += of_kind[held_out : 2 * held_out]
    return {split: [episode_name(recording, number) for number in sorted(part)] for split, part in parts.items()}


def scenario_of(recording: GameRecording, number: int) -> str:
    """Return the scenario of shard ``number``."""
    scenarios = recording.scenarios()
    return scenarios[number % len(scenarios)]


def episode_name(recording: GameRecording, number: int, beginning: int = 0) -> str:
    """Return the name of an episode of shard ``number``; a new episode starts when the scenario restarts.

    With several scenarios, the name contains the scenario.
    """
    parts = [f"episode-{number:06d}"]
    if len(recording.scenarios()) > 1:
        name = scenario_of(recording, number)
        parts.append(re.sub(r"[^A-Za-z0-9_]+", "-", Path(name).stem if name.endswith(".cfg") else name))
    return "-".join([*parts, str(beginning)] if beginning else parts)
