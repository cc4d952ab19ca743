"""Recording of what is played: an .mp4 of the pictures and the action log of the whole rollout."""

import queue
import threading
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from owl.viz.film import enlarged, write_film

WAITING = 64
"""Pictures that may wait for the encoder; then the player waits too."""


class Recording:
    """A film that is encoded by a thread while it is played.

    Args:
        folder: Where the files go.
        fps: Frames per second.
    """

    def __init__(self, folder: Path, fps: float) -> None:
        self.path = _free(folder)
        self._pictures: queue.Queue[np.ndarray | None] = queue.Queue(WAITING)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._write, args=(fps,), name="owl-film", daemon=True)
        self._thread.start()

    def add(self, rgb: np.ndarray) -> None:
        """Add uint8[H, W, 3]."""
        if self._failure is None:
            self._pictures.put(rgb)

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

    def _write(self, fps: float) -> None:
        try:
            pictures = map(enlarged, self._taken())
            if (first := next(pictures, None)) is not None:
                write_film(self.path, chain([first], pictures), fps)
        except BaseException as error:  # told by `finish`, in the thread of the player
            self._failure = error
            for _ in self._taken():
                pass

    def _taken(self) -> Iterator[np.ndarray]:
        while (rgb := self._pictures.get()) is not None:
            yield rgb


def _free(folder: Path) -> Path:
    """Return the path of a film of this second, with a name that no film and no log has."""
    name = second = time.strftime("%Y%m%d-%H%M%S")
    number = 0
    while any(folder.glob(f"{name}.*")):
        number += 1
        name = f"{second}-{number}"
    return folder / f"{name}.mp4"
