"""Play an action log again, and compare each frame with the recorded one."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, NamedTuple

import torch

from owl.errors import OwlError
from owl.play.beside import SideBySide
from owl.play.game import GameWorld
from owl.play.learned import LearnedWorld, Sources
from owl.play.log import ActionLog, digest, read_picture
from owl.play.world import Picture, Settings, World
from owl.rollout.shared import SharedWorld


class Replayed(NamedTuple):
    """A frame that was made again.

    Attributes:
        picture: The frame.
        same: Whether every pixel and every sample is that of the recording.
    """

    picture: Picture
    same: bool


def make_world(
    log: ActionLog,
    checkpoint: Sequence[str] = (),
    data: str | None = None,
    decoder: Sequence[str] = (),
    audio_decoder: str | None = None,
) -> World:
    """Make the world of a log again, with as many threads, on which the bits of sums depend.

    Args:
        log: The log.
        checkpoint: Where the world models are now, in their order; empty: where they were. The folder of a shared world
            has the rest.
        data: Where the dataset is now; None: where it was.
        decoder: Where the decoders are now, in their order; empty: where they were.
        audio_decoder: Where the decoder of sound is now; None: where it was.

    Raises:
        OwlError: A part is missing or has other weights.
    """
    origin = log.origin
    try:
        if origin.get("kind") == "game":
            scenario, (height, width), sound = origin["scenario"], origin["size"], origin.get("sound", False)
            return GameWorld(scenario, (height, width), sound)
        worlds = origin["worlds"] if origin.get("kind") == "world models" else [origin]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unknown(error) from error
    if checkpoint and len(checkpoint) != len(worlds):
        raise OwlError(
            "actions.origin",
            f"there are {len(checkpoint)} checkpoints, the log was recorded with {len(worlds)}; give one for each",
        )
    paths: Sequence[str | None] = checkpoint or [None] * len(worlds)
    made = [_learned(one, path, data, decoder, audio_decoder) for one, path in zip(worlds, paths, strict=True)]
    return made[0] if len(made) == 1 else SideBySide(made)


def _learned(
    origin: dict[str, Any],
    checkpoint: str | None,
    data: str | None,
    decoder: Sequence[str],
    audio_decoder: str | None,
) -> LearnedWorld:
    """Make a learned world of `make_world` again."""
    try:
        known = [item.name for item in fields(Sources) if item.name in origin]  # older logs know nothing of sound
        sources = Sources(**{"sound": False} | {name: origin[name] for name in known})
        expected, settings, threads = origin["fingerprints"], Settings(**origin["settings"]), origin["threads"]
    except (KeyError, TypeError) as error:
        raise _unknown(error) from error
    torch.set_num_threads(threads)
    shared = SharedWorld.find(checkpoint) if checkpoint else None
    if shared is not None:  # its scenes and decoders have moved with it
        data, decoder = data or shared.scenes, decoder or [shared.decoder(name) for name in shared.decoders]
    sources = replace(
        sources,
        checkpoint=checkpoint or sources.checkpoint,
        data=data or sources.data,
        decoders=tuple(decoder or sources.decoders),
        audio_decoder=audio_decoder or sources.audio_decoder,
    )
    world = LearnedWorld(sources, **asdict(settings) | ({"decoder": None} if decoder else {}))
    found = world.description.origin["fingerprints"]
    if found != expected:
        raise OwlError(
            "actions.other-weights",
            f"world model and decoders have the fingerprints {', '.join(found)}, the log was recorded with "
            f"{', '.join(expected)}; give the checkpoints of that time",
        )
    return world


def _unknown(error: Exception) -> OwlError:
    return OwlError("actions.origin", f"the log does not state how its world was made ({error!r}); record it again")


def replay(log: ActionLog, world: World) -> Iterator[Replayed]:
    """Yield each frame of a log after its start."""
    start = log.start
    if log.begin is not None:
        world.add_start(read_picture(log.begin, world.description.start_size))
        start = len(world.description.starts) - 1
    world.reset(start, log.seed)
    for action in log.actions:
        if action.settings != world.settings:
            world.change(action.settings)
        picture = world.step(action.buttons, action.axes)
        yield Replayed(picture, digest(picture) == action.picture)
