"""Pictures of rollouts under scripted controls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from owl.viz.film import ControlsPanel, as_array, beside, captioned, enlarged
from owl.viz.pictures import FAINT, png, tile_row, tile_size
from owl.viz.rollouts import STRIP_WIDTHS, axis_scales

if TYPE_CHECKING:
    from owl.rollout.scripted import Scripted


@dataclass(frozen=True)
class Row:
    """The rollout of a script from its first start.

    Attributes:
        name: The script.
        sides: uint8[T, 3, h, w] by caption.
        buttons: float[T, number of buttons].
        axes: float[T, number of axes].
    """

    name: str
    sides: dict[str, Tensor]
    buttons: Tensor
    axes: Tensor


def first_row(scripted: Scripted) -> Row:
    """Return the rollout from the first start, and the game's."""
    game = {} if scripted.true is None else {"game": scripted.true[0]}
    return Row(scripted.script.name, game | {"generated": scripted.generated[0]}, scripted.buttons, scripted.axes)


def film(row: Row, buttons: list[str], axes: list[str]) -> Iterator[np.ndarray]:
    """Yield a picture of each frame, the game's on the left, with the controls below."""
    panel: ControlsPanel | None = None
    scales = axis_scales(row.axes)
    for t in range(len(row.buttons)):
        tiles = [
            captioned(enlarged(as_array(frames[t])), f"{name}   {row.name}, frame {t + 1}")
            for name, frames in row.sides.items()
        ]
        shown = beside(tiles, len(tiles))
        panel = panel or ControlsPanel(buttons, axes, scales, shown.shape[1])
        yield np.concatenate([shown, panel.draw(row.buttons[t].numpy(), row.axes[t].numpy())])


def loop_row(scripted: Scripted) -> np.ndarray:
    """Draw the start, the middle and the end of a loop from the first start, the game's first: uint8[H, W, 3]."""
    moments = dict(zip(("start", "half-way", "end"), scripted.moments, strict=True))
    row = first_row(scripted)
    size = tile_size(scripted.generated.shape[-2], scripted.generated.shape[-1], STRIP_WIDTHS)
    return beside(
        [
            captioned(tile_row(as_array(frames[t])[None], size), f"{row.name}, {moment}, {name}", FAINT)
            for name, frames in row.sides.items()
            for moment, t in moments.items()
        ],
        len(moments) * len(row.sides),
    )


def loops(rows: list[np.ndarray]) -> bytes:
    """Draw pictures of `loop_row` below each other, as PNG."""
    return png(beside(rows, 1))
