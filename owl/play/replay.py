"""Play an action log again, and compare each frame with the recorded one."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import NamedTuple

import numpy as np
import torch

from owl.errors import OwlError
from owl.play.game import GameWorld
from owl.play.learned import LearnedWorld, Sources
from owl.play.log import ActionLog, digest
from owl.play.world import Settings, World


class Replayed(NamedTuple):
    """A frame that was made again.

    Attributes:
        rgb: uint8[H, W, 3].
        same: Whether every pixel is that of the recording.
    """

    rgb: np.ndarray
    same: bool


def make_world(
    log: ActionLog, checkpoint: str | None = None, data: str | None = None, decoder: Sequence[str] = ()
) -> World:
    """Make the world of a log again, with as many threads, on which the bits of sums depend.

    Args:
        log: The log.
        checkpoint: Where the world model is now; None: where it was.
        data: Where the dataset is now; None: where it was.
        decoder: Where the decoders are now, in their order; empty: where they were.

    Raises:
        OwlError: A part is missing or has other weights.
    """
    origin = log.origin
    if origin.get("kind") == "game":
        return GameWorld(origin["scenario"], tuple(origin["size"]))
    try:
        sources = Sources(**{item.name: origin[item.name] for item in fields(Sources)})
        expected, settings, threads = origin["fingerprints"], Settings(**origin["settings"]), origin["threads"]
    except (KeyError, TypeError) as error:
        raise OwlError(
            "actions.origin", f"the log does not tell how its world was made ({error!r}); record it again"
        ) from error
    torch.set_num_threads(threads)
    sources = replace(
        sources,
        checkpoint=checkpoint or sources.checkpoint,
        data=data or sources.data,
        decoders=tuple(decoder or sources.decoders),
    )
    world = LearnedWorld(sources, replace(settings, decoder="") if decoder else settings)
    found = world.description.origin["fingerprints"]
    if found != expected:
        raise OwlError(
            "actions.other-weights",
            f"world model and decoders have the fingerprints {', '.join(found)}, the log was recorded with "
            f"{', '.join(expected)}; give the checkpoints of that time",
        )
    return world


def replay(log: ActionLog, world: World) -> Iterator[Replayed]:
    """Yield each frame of a log after its start."""
    world.reset(log.start, log.seed)
    for action in log.actions:
        if action.settings != world.settings:
            world.change(action.settings)
        rgb = world.step(action.buttons, action.axes).rgb
        yield Replayed(rgb, digest(rgb) == action.picture)
