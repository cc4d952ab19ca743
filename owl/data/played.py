"""Recording of a dataset from games that a person has played: their controls are repeated."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from owl.data import game
from owl.data.jobs import local_folder, run
from owl.data.recorder import (
    GameRecording,
    RecordJob,
    check_available,
    describe_modalities,
    describe_source,
    named_labels,
)
from owl.data.shards import DatasetInfo, ShardIndex
from owl.data.splits import split_in_order
from owl.errors import OwlError
from owl.version import code_version


@dataclass(frozen=True)
class PlayedGame:
    """What a person did in a game, from its start on.

    Attributes:
        scenario: As in `owl.data.game.find_scenario`.
        seed: Seed of the game.
        controls: float64[T, 5 + 1], controls of each tic in the order of ``BUTTONS`` and ``AXES``.
    """

    scenario: str
    seed: int
    controls: np.ndarray

    @property
    def identity(self) -> str:
        """Sixteen hexadecimal digits, equal for equal games."""
        content = np.ascontiguousarray(self.controls, np.float64).tobytes()
        return hashlib.sha256(f"{self.scenario} {self.seed} ".encode() + content).hexdigest()[:16]


def record_played(path: str, recording: GameRecording, games: Sequence[PlayedGame]) -> DatasetInfo:
    """Play again what a person has played, and record it as a dataset, or finish an interrupted one.

    Args:
        path: A local folder, created if needed.
        recording: Size, modalities and number of workers. Episodes have at most ``episode_frames`` frames, and a third
            of all frames, so that every split has one: the last 10% of them are for validation and test. They are
            equally long, so that the last one, which may be all of a split, is not a rest of a few frames.
        games: One for each shard.

    Raises:
        OwlError: As `record_game`.
    """
    total = sum(len(played.controls) + 1 for played in games)
    episodes = -(-total // max(1, min(recording.episode_frames, total // 3)))
    recording = replace(
        recording,
        frames=total,
        scenario=[played.scenario for played in games],
        episode_frames=max(1, -(-total // max(1, episodes))),
    )
    root = local_folder(path)
    if total < 3:
        raise OwlError(
            "arguments.too-small", f"the logs have {total} frames, expected at least 3, one for each split; play longer"
        )
    check_available(recording)
    return run(PlayedJob(recording, games), root, recording.workers or len(os.sched_getaffinity(0)))


class ReplayPolicy:
    """A policy that repeats given controls.

    Args:
        controls: float64[T, 5 + 1].
    """

    def __init__(self, controls: np.ndarray) -> None:
        self._controls = iter(controls)

    def act(self, x: float, y: float) -> np.ndarray:
        """Return the next controls, idle after the last ones."""
        return next(self._controls, game.idle())


class PlayedJob(RecordJob):
    """Recording job of games that a person has played: a game per shard, cut into episodes."""

    kinds = ("vizdoom-played",)

    def __init__(self, recording: GameRecording, games: Sequence[PlayedGame]) -> None:
        self.recording, self.games = recording, list(games)
        self.shards = {number: len(played.controls) + 1 for number, played in enumerate(games)}
        source = {name: value for name, value in describe_source(recording).items() if name not in ("seed", "held_out")}
        self.info = DatasetInfo(
            fps=game.FPS,
            size=recording.size,
            modalities=describe_modalities(recording),
            splits={"train": [], "validation": [], "test": []},
            source=source | {"kind": "vizdoom-played", "played": [played.identity for played in games]},
            code_version=code_version(),
        )

    def seed(self, number: int) -> int:
        return self.games[number].seed

    def policy(self, number: int) -> game.Policy:
        return ReplayPolicy(self.games[number].controls)

    def starts_episode(self, position: int, frame: game.Frame) -> bool:
        """Return whether a frame starts another episode: after a restart, and after a number of frames."""
        return frame.cut or position % self.recording.episode_frames == 0

    def is_described(self, info: DatasetInfo) -> bool:
        return bool(info.splits["train"]) and super().is_described(info)

    def describe(self, root: Path, info: DatasetInfo, index: ShardIndex) -> DatasetInfo:
        splits = split_in_order(index.episodes.tolist())
        return replace(info, splits=splits, modalities=named_labels(root, info, index))
