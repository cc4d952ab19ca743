"""Recorded games, replayed up to a frame and continued with other controls."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from owl.data import game
from owl.data.played import ReplayPolicy
from owl.data.recorder import GameRecording, RecordJob, episode_name, scenario_of
from owl.data.shards import DatasetInfo
from owl.errors import OwlError

KEEP_EPISODES = ("encoded", "annotated")
"""Kinds of dataset that have the same episodes as their source."""


class SwitchingPolicy:
    """A policy that switches to another one.

    Args:
        first: Policy of the first tics.
        tics: Number of these tics.
        second: Policy of the following tics.
    """

    def __init__(self, first: game.Policy, tics: int, second: game.Policy) -> None:
        self._first, self._tics, self._second = first, tics, second

    def act(self, x: float, y: float) -> np.ndarray:
        """Return the controls of the next tic; see `owl.data.game.Policy`."""
        self._tics -= 1
        return (self._first if self._tics >= 0 else self._second).act(x, y)


@dataclass(frozen=True)
class RecordedGame:
    """The recording of a dataset by ``data record``.

    Attributes:
        recording: Its settings.
    """

    recording: GameRecording

    @classmethod
    def find(cls, url: str) -> "RecordedGame":
        """Find the recording of a dataset, or of the one that it was encoded or annotated from.

        Raises:
            OwlError: It was not recorded with the random policy of the installed version of the game, no game is
                installed, or the dataset that it was encoded or annotated from does not exist.
        """
        source: dict[str, Any] = DatasetInfo.load(url).source
        while source.get("kind") in KEEP_EPISODES:
            source = DatasetInfo.load(source["path"]).source
        if source.get("kind") != "vizdoom":
            raise OwlError(
                "game.replay",
                f"{url} is from {source.get('kind', 'elsewhere')}, expected a recording of the random policy, or a "
                "dataset encoded from one; record one with python -m owl data record",
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
        """Replay an episode up to a frame, and continue with other controls.

        Args:
            episode: Name of the episode.
            frame: Number of the last frame with the recorded controls, from 0.
            controls: float[T, 5 + 1], controls of each following tic in the order of `owl.data.game.BUTTONS` and
                ``AXES``.

        Yields:
            The ``frame + 1 + T`` frames from the beginning of the episode.

        Raises:
            OwlError: The episode started after a restart of the scenario, or the scenario ends before the last frame.
        """
        recording, number = self.recording, int(episode.split("-")[1])
        if episode != episode_name(recording, number):
            raise OwlError(
                "game.replay",
                f"{episode} started when its scenario restarted, expected the first of a game; give a dataset of "
                "another scenario",
            )
        seed = RecordJob(recording).seed(number)
        policy = SwitchingPolicy(game.random_policy(seed), frame, ReplayPolicy(controls))
        length = frame + len(controls) + 1
        frames = game.play(scenario_of(recording, number), length, recording.size, seed, policy=policy)
        for position, shown in enumerate(frames):
            if position and shown.cut:
                raise OwlError(
                    "game.replay",
                    f"{episode} ends at frame {position}, expected {length} frames; give a dataset of another scenario",
                )
            yield shown
