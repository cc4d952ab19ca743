"""Action logs: everything that a person did in a world, so that it can be played again frame by frame.

A log is a file of JSON lines. The first holds ``format``, ``version``, the ``origin`` of the world (how to make it
again), its ``buttons`` and ``axes``, the ``start`` and ``seed`` of the rollout, and ``begin``, the picture of a start
that the player gave, as PNG in base64. Each other line is a frame:

- ``held``: names of the buttons that were down;
- ``moved``: movement of each axis, in its unit;
- ``picture``: twelve hexadecimal digits of the SHA-256 of the frame's pixels, and of its sound if it has one;
- ``settings``: of this frame and the following ones, where they have changed.
"""

import base64
import hashlib
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from owl.atomic import atomic_write
from owl.errors import OwlError
from owl.play.world import Picture, Settings

FORMAT, VERSION = "owl-actions", 1


@dataclass(frozen=True)
class Action:
    """What led to a frame.

    Attributes:
        buttons: bool[number of buttons].
        axes: float32[number of axes].
        settings: Those with which the frame was made.
        picture: Digest of the frame, see `digest`.
    """

    buttons: np.ndarray
    axes: np.ndarray
    settings: Settings
    picture: str


@dataclass(frozen=True)
class ActionLog:
    """A rollout that a person has played.

    Attributes:
        origin: How to make the world again: `owl.play.world.Description.origin`.
        buttons: Names of the buttons.
        axes: Names of the axes.
        start: Number of the start scene.
        seed: Seed of all noise.
        actions: One for each frame after the start.
        begin: Picture of a start that the player gave, as PNG; None for a start of the world.
    """

    origin: dict[str, Any]
    buttons: list[str]
    axes: list[str]
    start: int
    seed: int
    actions: list[Action] = field(default_factory=list)
    begin: bytes | None = None

    def save(self, path: str | Path) -> None:
        """Write the log, atomically."""
        head = {"format": FORMAT, "version": VERSION} | {n: v for n, v in vars(self).items() if n != "actions"}
        head["begin"] = None if self.begin is None else base64.b64encode(self.begin).decode()
        lines, settings = [json.dumps(head)], None
        for action in self.actions:
            line: dict[str, Any] = {
                "held": [name for name, down in zip(self.buttons, action.buttons, strict=True) if down],
                "moved": action.axes.tolist(),
                "picture": action.picture,
            }
            if action.settings != settings:
                settings = action.settings
                line["settings"] = asdict(settings)
            lines.append(json.dumps(line))
        atomic_write(path, "\n".join(lines) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "ActionLog":
        """Read a log.

        Raises:
            OwlError: The file is missing, is no action log, or is of another version.
        """
        if not Path(path).is_file():
            raise OwlError(
                "actions.missing", f"there is no file {path}, expected an action log; give one that `play` recorded"
            )
        number = 1
        try:
            lines = Path(path).read_text("utf-8").splitlines()
            head = json.loads(lines[0])
            if (head.pop("format"), version := head.pop("version")) != (FORMAT, VERSION):
                raise OwlError(
                    "actions.version",
                    f"{path} is of version {version}, this code reads {FORMAT} version {VERSION}; use the release of "
                    "owl that wrote it",
                )
            if head.get("begin") is not None:
                head["begin"] = base64.b64decode(head["begin"], validate=True)
            log, settings = cls(**head), Settings()
            for line in lines[1:]:
                number += 1
                content = json.loads(line)
                settings = Settings(**content["settings"]) if "settings" in content else settings
                log.actions.append(log._action(content, settings))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise OwlError(
                "actions.damaged", f"line {number} of {path} is not of an action log ({error!r}); record it again"
            ) from error
        return log

    def _action(self, content: dict[str, Any], settings: Settings) -> Action:
        unknown = set(content["held"]) - set(self.buttons)
        if unknown or len(content["moved"]) != len(self.axes):
            raise ValueError(f"unknown buttons {sorted(unknown)} or a wrong number of axes")
        buttons = np.array([name in content["held"] for name in self.buttons], bool)
        return Action(buttons, np.array(content["moved"], np.float32), settings, str(content["picture"]))


def read_picture(content: bytes, size: tuple[int, int]) -> np.ndarray:
    """Read a picture that comes from outside.

    Args:
        content: JPEG or PNG.
        size: (H, W) that it must have; larger ones are not decoded.

    Returns:
        uint8[H, W, 3].

    Raises:
        OwlError: It is damaged, of another format, or of another size.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as picture:
            if picture.size == size[::-1]:
                return np.array(picture.convert("RGB"))
            found = f"{picture.height}x{picture.width} (height x width)"
    except Exception:  # Pillow raises many types for damaged files
        found = "damaged, or neither JPEG nor PNG"
    raise OwlError("play.picture", f"the picture is {found}, expected {size[0]}x{size[1]}; give another one")


def digest(picture: Picture) -> str:
    """Return twelve hexadecimal digits that identify the pixels and the sound of a frame."""
    found = hashlib.sha256(np.ascontiguousarray(picture.rgb).data)
    if picture.sound is not None:
        found.update(np.ascontiguousarray(picture.sound).data)
    return found.hexdigest()[:12]
