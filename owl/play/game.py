"""The real game as a world: ViZDoom, played by a person."""

import sys
import time
from collections.abc import Generator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from owl.data import game
from owl.play.timeline import Played, in_order
from owl.play.world import Description, Picture, Settings, SoundFormat, World

TURN = 6.0
"""Degrees per tic of a fully deflected stick, the fastest turn of the random policy that records datasets."""


class Person:
    """A policy whose controls come from outside."""

    def __init__(self) -> None:
        self.controls = game.idle()

    def act(self, x: float, y: float) -> np.ndarray:
        """Return the latest controls."""
        return self.controls


class GameState(NamedTuple):
    """State of a game: its seed and the controls of each tic; the game repeats them quickly."""

    seed: int
    played: Played[np.ndarray] | None


class GameWorld(World):
    """A scenario of ViZDoom.

    Args:
        scenario: As in `owl.data.game.find_scenario`.
        size: (H, W) of the pictures.
        sound: Whether it is heard.

    Raises:
        OwlError: The game is not installed, or the scenario, the size or the sound is not available.
    """

    def __init__(self, scenario: str, size: tuple[int, int], sound: bool) -> None:
        game.find_scenario(scenario)
        game.check_size(size)
        if sound:
            game.check_audio()
        self.scenario, self.size, self.sound, self.settings = scenario, size, sound, Settings()
        self.description = Description(
            kind="game",
            name=scenario,
            device="the CPU",
            buttons=list(game.BUTTONS),
            axes=dict.fromkeys(game.AXES, TURN),
            fps=game.FPS,
            size=size,
            origin={
                "kind": "game",
                "scenario": scenario,
                "size": list(size),
                "sound": sound,
                "vizdoom": game.installed_version(),
            },
            sound=SoundFormat(game.SAMPLE_RATE, game.CHANNELS) if sound else None,
        )
        self._frames: Generator[game.Frame, None, None] | None = None

    def reset(self, start: int, seed: int) -> Picture:
        """Start a new game."""
        self.check_start(start, seed)
        self.close()
        self._seed, self._person = seed, Person()
        self._played: Played[np.ndarray] | None = None
        buffers: tuple[game.Buffer, ...] = ("audio",) if self.sound else ()
        self._frames = game.play(self.scenario, sys.maxsize, self.size, seed, buffers, policy=self._person)
        return replace(self._next(), hear=None)

    def step(self, buttons: np.ndarray, axes: np.ndarray) -> Picture:
        """Play one tic."""
        self._person.controls = np.concatenate([buttons, axes]).astype(np.float64)
        self._played = Played(self._played, self._person.controls)
        return self._next()

    def snapshot(self) -> GameState:
        """Return what was played."""
        return GameState(self._seed, self._played)

    def restore(self, snapshot: GameState) -> None:
        """Start again and repeat what was played, as fast as the game goes."""
        self.reset(0, snapshot.seed)
        for controls in in_order(snapshot.played):
            self.step(controls[: len(game.BUTTONS)], controls[len(game.BUTTONS) :])

    def snapshot_bytes(self) -> int:
        """Return nothing: branches share what was played before."""
        return 0

    def _next(self) -> Picture:
        assert self._frames is not None
        start = time.perf_counter()
        frame = next(self._frames)
        seconds = {"game": time.perf_counter() - start}
        if not self.sound:
            return Picture(frame.rgb, seconds)
        sound = frame.state.audio_buffer.T.astype(np.float32) / 2**15
        return Picture(frame.rgb, seconds, lambda: sound)

    def close(self) -> None:
        """End the game."""
        if self._frames is not None:
            self._frames.close()
            self._frames = None
