"""A shard job whose frames are counted, apart from tests that import much: its workers start in a second."""

import os
import signal
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from owl.data import codecs
from owl.data.jobs import Frames, ShardJob
from owl.data.shards import DatasetInfo, ShardIndex

SHARDS, EPISODES, FRAMES = 4, 2, 5


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def diverge() -> None:
    raise ValueError("it diverged")


def kill_parent() -> None:
    """Kill the process that ``run`` is called in, and wait to be ended."""
    os.kill(os.getppid(), signal.SIGKILL)
    threading.Event().wait()


class Counting(ShardJob):
    """Frames of controls that say where they belong; at frame 3 of an episode something may happen."""

    doing, kinds = "counting", ("counted",)

    def __init__(self, seed: int = 0, at: str = "", happens: Callable[[], None] = kill, damaged: str = "") -> None:
        self._seed, self._at, self._happens, self._damaged = seed, at, happens, damaged
        self.shards = dict.fromkeys(range(SHARDS), EPISODES * FRAMES)
        splits = {"train": [f"e{number}" for number in range(SHARDS * EPISODES)]}
        modalities = {"controls": {"extension": "controls.npy", "buttons": [], "axes": list("abcde")}}
        self.info = DatasetInfo(30.0, (24, 40), modalities, splits, {"kind": "counted", "seed": seed}, "test")

    def settings(self, info: DatasetInfo) -> dict[str, Any]:
        return {"seed": info.source["seed"]}

    def frames(self, number: int) -> Frames:
        for episode in range(number * EPISODES, (number + 1) * EPISODES):
            for frame in range(FRAMES):
                if f"e{episode}" == self._at and frame == 3:
                    self._happens()
                if f"e{episode}" == self._damaged and frame == 2:
                    warnings.warn(f"e{episode} ends before frame 2", stacklevel=1)
                    break
                controls = np.array([self._seed, number, episode, frame, 0], np.float32)
                yield f"e{episode}", {"controls.npy": codecs.encode_array(controls)}

    def is_described(self, info: DatasetInfo) -> bool:
        return "frames" in info.modalities["controls"]

    def describe(self, root: Path, info: DatasetInfo, index: ShardIndex) -> DatasetInfo:
        counted = info.modalities["controls"] | {"frames": int(index.episode_frames.sum())}
        return replace(info, modalities={"controls": counted})


class Unloadable(Counting):
    """One that cannot be loaded in another process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no job",)
