"""Worlds side by side, played with the same inputs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from owl.errors import OwlError
from owl.play.world import Description, Picture, Settings, World
from owl.viz.film import beside


class SideBySide(World):
    """Learned worlds that get the same start, seed, controls and settings, as one world with a wide picture.

    Where their decoders have other names, each keeps its own. The sound is that of the first world.

    Args:
        worlds: At least two.

    Raises:
        OwlError: They have other controls, frame rates, sizes or numbers of start scenes.
    """

    def __init__(self, worlds: Sequence[World]) -> None:
        self.worlds = list(worlds)
        descriptions = [world.description for world in self.worlds]
        first, names = descriptions[0], [one.name for one in descriptions]
        if len(set(names)) < len(names):  # checkpoints of one run
            names = [one.origin["checkpoint"] for one in descriptions]
        for one, name in zip(descriptions[1:], names[1:], strict=True):
            for what, found, expected in zip(
                ("buttons", "axes", "frames per second", "picture (height, width)", "start scenes"),
                _shared(one),
                _shared(first),
                strict=True,
            ):
                if found != expected:
                    raise OwlError(
                        "play.side-by-side",
                        f"{what} of {name}: {found}, of {names[0]}: {expected}, expected the same of worlds side by "
                        "side; play world models that were trained on the same footage",
                    )
        self.references = [reference for world in self.worlds for reference in world.references]
        decoders = [name for name in first.decoders if all(name in one.decoders for one in descriptions)]
        height, width = beside([np.zeros((*first.size, 3), np.uint8)] * len(descriptions), len(descriptions)).shape[:2]
        self.settings = replace(self.worlds[0].settings, decoder=decoders[0] if decoders else "")
        self.description = Description(
            kind="world models",
            name=" · ".join(names),
            device=first.device,
            buttons=first.buttons,
            axes=first.axes,
            fps=first.fps,
            size=(height, width),
            starts=first.starts,
            decoders=decoders,
            origin={"kind": "world models", "worlds": [one.origin for one in descriptions]},
            sound=first.sound,
            names=names,
        )
        self.change(self.settings)  # each may have started with others

    def reset(self, start: int, seed: int) -> Picture:
        """Start all."""
        return _joined([world.reset(start, seed) for world in self.worlds])

    def step(self, buttons: np.ndarray, axes: np.ndarray) -> Picture:
        """Make a frame of each, one after the other."""
        return _joined([world.step(buttons, axes) for world in self.worlds])

    def add_start(self, rgb: np.ndarray) -> None:
        """Add a start to all, or to none if one of them cannot start with it; the first one's are shown."""
        for number, world in enumerate(self.worlds):
            try:
                world.add_start(rgb)
            except BaseException:
                for earlier in self.worlds[:number]:
                    earlier.remove_start()
                raise

    def remove_start(self) -> None:
        """Remove it from all."""
        for world in self.worlds:
            world.remove_start()

    def change(self, settings: Settings) -> None:
        """Use other settings in all."""
        if settings.decoder != self.settings.decoder and settings.decoder not in self.description.decoders:
            raise OwlError(
                "play.decoder",
                f"there is no decoder {settings.decoder} of all worlds, expected one of "
                f"{', '.join(self.description.decoders) or 'none'}; choose another",
            )
        for world in self.worlds:
            world.change(replace(settings, decoder=settings.decoder or world.settings.decoder))
        self.settings = settings

    def snapshot(self) -> Any:
        """Copy the states."""
        return self.settings, [world.snapshot() for world in self.worlds]

    def restore(self, snapshot: Any) -> None:
        """Return to the states."""
        self.settings, states = snapshot
        for world, state in zip(self.worlds, states, strict=True):
            world.restore(state)

    def snapshot_bytes(self) -> int:
        """Return the size of all states."""
        return sum(world.snapshot_bytes() for world in self.worlds)

    def close(self) -> None:
        """Close all."""
        for world in self.worlds:
            world.close()


def _shared(description: Description) -> tuple[Any, ...]:
    """Return what worlds side by side have in common."""
    found = description
    return found.buttons, list(found.axes), found.fps, found.size, len(found.starts)


def _joined(pictures: Sequence[Picture]) -> Picture:
    """Join pictures of one size; their times add up."""
    parts = {name for picture in pictures for name in picture.seconds}
    seconds = {name: sum(picture.seconds.get(name, 0.0) for picture in pictures) for name in sorted(parts)}
    return Picture(beside([picture.rgb for picture in pictures], len(pictures)), seconds, pictures[0].hear)
