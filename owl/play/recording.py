"""Recording of what is played, as an .mp4 with sound."""

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from owl.play.world import Description, Picture
from owl.viz.film import apart, beside, captioned, enlarged, write_film

WAITING = 64
"""Pictures that may wait for the encoder; then the player waits too."""


class Recording:
    """A film that is encoded by a thread while it is played.

    Args:
        folder: Where the files go.
        description: Of the world.
    """

    def __init__(self, folder: Path, description: Description) -> None:
        self.path = _free(folder)
        self._pictures: queue.Queue[Picture | None] = queue.Queue(WAITING)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._write, args=(description,), name="owl-film", daemon=True)
        self._thread.start()

    def add(self, picture: Picture) -> None:
        """Add a frame."""
        if self._failure is None:
            self._pictures.put(picture)

    def finish(self) -> Path:
        """Finish the film and return its path; without pictures there is no film.

        Raises:
            OSError: It cannot be written.
        """
        self._pictures.put(None)
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self.path

    def _write(self, description: Description) -> None:
        try:
            pictures = self._taken()
            if (first := next(pictures, None)) is not None:
                write_pictures(self.path, chain([first], pictures), description)
        except BaseException as error:  # reported by `finish`, in the thread of the player
            self._failure = error
            for _ in self._taken():
                pass

    def _taken(self) -> Iterator[Picture]:
        while (picture := self._pictures.get()) is not None:
            yield picture


def write_pictures(path: str | Path, pictures: Iterable[Picture], description: Description) -> None:
    """Write frames of a world as an .mp4, with their sound, and with captions where worlds are side by side.

    Args:
        path: Destination.
        pictures: The frames, at least one.
        description: Of the world.
    """
    sounds: deque[np.ndarray] = deque()
    silence = np.zeros((1, 0), np.float32)

    def shown() -> Iterator[np.ndarray]:
        for picture in pictures:
            sounds.append(silence if picture.sound is None else picture.sound)
            yield captioned_row(picture.rgb, description.names)

    def heard() -> Iterator[np.ndarray]:  # asked after each picture
        while True:
            yield sounds.popleft()

    sample_rate = None if description.sound is None else description.sound.sample_rate
    write_film(path, shown(), description.fps, heard(), sample_rate)


def captioned_row(rgb: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Enlarge a small uint8[H, W, 3], and name the worlds that it shows side by side."""
    if not names:
        return enlarged(rgb)
    parts = zip(apart(rgb, len(names)), names, strict=True)
    return beside([captioned(enlarged(part), name) for part, name in parts], len(names))


def _free(folder: Path) -> Path:
    """Return the path of a film of this second, with a name that no film and no log has."""
    name = second = time.strftime("%Y%m%d-%H%M%S")
    number = 0
    while any(folder.glob(f"{name}.*")):
        number += 1
        name = f"{second}-{number}"
    return folder / f"{name}.mp4"
