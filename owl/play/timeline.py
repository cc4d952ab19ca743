"""Moments of a rollout to which the player can return, in branches."""

from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

from owl.play.log import Action

BUDGET = 2**29
"""Bytes of all snapshots together."""
MOST, LEAST = 240, 8
"""Largest number of moments, and the number that is kept whatever a snapshot takes."""

T = TypeVar("T")


class Played(NamedTuple, Generic[T]):
    """What was done since the start, the last thing first: branches share their beginnings."""

    before: "Played[T] | None"
    last: T


@dataclass(frozen=True)
class Moment:
    """A state of the world.

    Attributes:
        number: Unique number.
        frame: Frames since the start.
        branch: Number of the branch; a rollout starts with branch 0.
        parent: Number of the moment before it on its path.
        jpeg: The frame.
        snapshot: State of the world.
        played: Actions that led here.
    """

    number: int
    frame: int
    branch: int
    parent: int | None
    jpeg: bytes
    snapshot: Any
    played: Played[Action] | None


class Timeline:
    """The moments of a rollout. Old ones are thinned out, so that memory is bounded.

    Attributes:
        moments: By number, in the order in which they were added.
        current: The last moment on the path to the current frame.
    """

    def __init__(self) -> None:
        self.moments: dict[int, Moment] = {}
        self.current: Moment | None = None
        self._next = 0

    def clear(self, snapshot_bytes: int) -> None:
        """Forget all moments, for another rollout with snapshots of this size; numbers are not used again."""
        self.most = min(MOST, max(LEAST, BUDGET // max(1, snapshot_bytes)))
        self.moments, self.current = {}, None

    def add(self, frame: int, branch: int, jpeg: bytes, snapshot: Any, played: Played[Action] | None) -> Moment:
        """Add a moment after the current one; of too many, drop the one that leaves the smallest gap for its age."""
        parent = None if self.current is None else self.current.number
        moment = self.current = Moment(self._next, frame, branch, parent, jpeg, snapshot, played)
        self._next += 1
        self.moments[moment.number] = moment
        numbers = list(self.moments)
        if len(numbers) > self.most:
            # the first and the last one stay
            gaps = {
                number: (after - before) / (numbers[-1] - number + 1)
                for before, number, after in zip(numbers, numbers[1:-1], numbers[2:], strict=False)
            }
            dropped = self.moments.pop(min(gaps, key=gaps.__getitem__))
            for number, kept in self.moments.items():
                if kept.parent == dropped.number:
                    self.moments[number] = replace(kept, parent=dropped.parent)
        return moment


def in_order(played: Played[T] | None) -> list[T]:
    """Return what was done since the start, the first thing first."""
    done: list[T] = []
    while played is not None:
        done.append(played.last)
        played = played.before
    return done[::-1]
