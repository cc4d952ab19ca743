"""Recorded games, played again up to a frame and continued with other controls: what would have been seen."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from owl.data import game
from owl.data.played import Script
from owl.data.recorder import GameRecording, RecordJob, episode_name, scenario_of
from owl.data.shards import DatasetInfo
from owl.errors import OwlError


class Takeover:
    """A policy that hands over to another one.

    Args:
        before: Who plays first.
        tics: For how many tics.
        after: Who plays then.
    """

    def __init__(self, before: game.Policy, tics: int, after: game.Policy) -> None:
        self._before, self._tics, self._after = before, tics, after

    def act(self, x: float, y: float) -> np.ndarray:
        """Return the controls of the one whose turn it is."""
        self._tics -= 1
        return (self._before if self._tics >= 0 else self._after).act(x, y)


@dataclass(frozen=True)
class RecordedGame:
    """The recording of a dataset by ``data record``.

    Attributes:
        recording: Its settings.
    """

    recording: GameRecording

    @classmethod
    def find(cls, url: str) -> "RecordedGame":
        """Find the recording that a dataset, or the one that it was encoded from, was made by.

        Raises:
            OwlError: It was not recorded with the random policy of the game that is installed, no game is installed, or
                the dataset that it was encoded from is not here.
        """
        source: dict[str, Any] = DatasetInfo.load(url).source
        while source.get("kind") != "vizdoom" and "path" in source:
            source = DatasetInfo.load(source["path"]).source
        if source.get("kind") != "vizdoom":
            raise OwlError(
                "game.replay",
                f"{url} is from {source.get('kind', 'elsewhere')}, expected a recording of the random policy; record "
                "one with python -m owl data record",
            )
        if source["vizdoom"] != (here := game.installed_version()):
            raise OwlError(
                "game.replay",
                f"{url} was recorded with ViZDoom {source['vizdoom']}, expected the installed {here}; record one with "
                "python -m owl data record",
            )
        names = ("frames", "scenario", "seed", "episode_frames", "held_out")
        known = {name: source[name] for name in names if name in source}
        return cls(GameRecording(size=(source["size"][0], source["size"][1]), **known))

    def play(self, episode: str, frame: int, controls: np.ndarray) -> Iterator[game.Frame]:
        """Yield the frames of an episode, in which a frame is followed by other controls than it was.

        Args:
            episode: Its name.
            frame: The last frame that is as recorded, from 0.
            controls: float[T, 5 + 1], of each tic after it.

        Yields:
            All frames from the first one of the episode to the T frames after this one.

        Raises:
            OwlError: The episode began after the scenario had ended, or the game ends before.
        """
        recording, number = self.recording, int(episode.split("-")[1])
        if episode != episode_name(recording, number):
            raise OwlError(
                "game.replay",
                f"{episode} began when its scenario ended, expected the beginning of a game; give a dataset of another "
                "scenario",
            )
        seed = RecordJob(recording).seed(number)
        policy = Takeover(game.random_policy(seed), frame, Script(controls))
        length = frame + len(controls) + 1
        frames = game.play(scenario_of(recording, number), length, recording.size, seed, policy=policy)
        for position, shown in enumerate(frames):
            if position and shown.cut:
                raise OwlError(
                    "game.replay",
                    f"{episode} ends at frame {position}, expected {length} frames; give a dataset of another scenario",
                )
            yield shown
