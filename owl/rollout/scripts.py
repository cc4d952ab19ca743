"""Scripted controls: the same movements for every world model, such as a turn by 90 degrees."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from owl.errors import OwlError


@dataclass(frozen=True)
class Move:
    """Controls for some time.

    Attributes:
        seconds: How long.
        buttons: The buttons that are held.
        axes: Total movement of each axis by name, in its unit.
    """

    seconds: float
    buttons: tuple[str, ...] = ()
    axes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Script:
    """Moves one after another; the first one is idle.

    Attributes:
        name: Its name in metrics.
        moves: The moves.
        returns: Whether the last frame shows again what was seen before the first movement.
    """

    name: str
    moves: tuple[Move, ...]
    returns: bool = False

    @property
    def controls(self) -> list[str]:
        """Names of the controls that are used, in order."""
        return list(dict.fromkeys(name for move in self.moves for name in (*move.buttons, *move.axes)))

    def onset(self, fps: float) -> int:
        """Return the first frame in which a control is used."""
        idle = 0
        for move in self.moves:
            if move.buttons or move.axes:
                break
            idle += _frames(move, fps)
        return idle

    def played(self, buttons: Sequence[str], axes: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        """Return the controls of each frame, as a world model takes them.

        Args:
            buttons: Names of the world model's buttons.
            axes: Names of its axes.
            fps: Its frames per second.

        Returns:
            float[T, number of buttons] and float[T, number of axes].
        """
        held, moved = [], []
        for move in self.moves:
            count = _frames(move, fps)
            pressed = torch.tensor([float(name in move.buttons) for name in buttons])
            turned = torch.tensor([move.axes.get(name, 0.0) / count for name in axes])
            held.append(pressed.expand(count, -1))
            moved.append(turned.expand(count, -1))
        return torch.cat(held), torch.cat(moved)


def load_scripts(path: str | None, buttons: Sequence[str], axes: Sequence[str]) -> list[Script]:
    """Read scripts.

    Args:
        path: A YAML file such as ``owl/rollout/scripts.yaml``; None: this one, without the scripts whose controls the
            world model does not have.
        buttons: Names of the world model's buttons.
        axes: Names of its axes.

    Raises:
        OwlError: The file is missing, or describes no scripts with these controls.
    """
    if path is not None and not Path(path).is_file():
        raise OwlError("rollout.scripts", f"there is no file {path}, expected scripted controls; correct --scripts")
    file = files("owl.rollout") / "scripts.yaml" if path is None else Path(path)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        found = [_script(name, value) for name, value in content.items()]
        if not found:
            raise ValueError("it has none")
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise OwlError(
            "rollout.scripts",
            f"{path} does not describe scripts ({' '.join(str(error).split())}), expected name: {{moves: [{{seconds: "
            "1, buttons: [...], axes: {name: total}}, ...]}, of which the first move is idle; correct it",
        ) from error
    known = {*buttons, *axes}
    if path is None:
        return [script for script in found if known.issuperset(script.controls)]
    for script in found:
        for name in script.controls:
            if name not in known:
                raise OwlError(
                    "rollout.scripts",
                    f"the script {script.name} of {path} uses {name}, the world model has "
                    f"{', '.join([*buttons, *axes])}; use these",
                )
    return found


def _frames(move: Move, fps: float) -> int:
    return max(1, round(move.seconds * fps))


def _script(name: str, value: dict[str, Any]) -> Script:
    for part, known in (
        (value, {"moves", "returns"}),
        *((move, {"seconds", "buttons", "axes"}) for move in value["moves"]),
    ):
        if unknown := part.keys() - known:
            raise ValueError(f"{name} has {min(unknown)}")
        if isinstance(part.get("buttons"), str):
            raise ValueError(f"the buttons of {name} are {part['buttons']}, not a list")
    moves = tuple(
        Move(
            seconds=float(move["seconds"]),
            buttons=tuple(map(str, move.get("buttons", ()))),
            axes={str(axis): float(total) for axis, total in move.get("axes", {}).items()},
        )
        for move in value["moves"]
    )
    script = Script(str(name), moves, bool(value.get("returns", False)))
    if not all(0 < move.seconds < 3600 for move in moves):
        raise ValueError(f"a move of {name} has no positive duration")
    if not all(total and math.isfinite(total) for move in moves for total in move.axes.values()):
        raise ValueError(f"a move of {name} has an axis that does not move")
    if not moves or moves[0].buttons or moves[0].axes or not script.controls:
        raise ValueError(f"{name} does not start idle, or does nothing")
    return script
