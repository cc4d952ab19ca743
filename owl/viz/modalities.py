"""Pictures of depth and optical flow with their legends, and of a reconstruction of several modalities."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from owl.viz.pictures import BACKGROUND, CAPTION_HEIGHT, FAINT, FONT_SIZE, GAP, TEXT, tile_row, tile_size

LEGEND_WIDTH = 128  # pixels: also the captions of the rows must fit
NOT_MEASURED = (63, 63, 70)
BAR_WIDTH = 14


@dataclass(frozen=True)
class Row:
    """A row of tiles.

    Attributes:
        caption: Text at its left, in line with the notes.
        tiles: uint8[B, H, W, 3].
        notes: Text above each tile; as many as tiles, or none.
        legend: Picture below the caption, at most as high as the tiles and ``LEGEND_WIDTH`` wide; see `depth_legend`.
    """

    caption: str
    tiles: np.ndarray
    notes: Sequence[str] = ()
    legend: np.ndarray | None = None


def draw_rows(rows: Sequence[Row]) -> np.ndarray:
    """Draw rows of tiles of one size below each other, with legends at their left.

    Returns:
        uint8[height, width, 3], RGB.
    """
    size = tile_size(*rows[0].tiles.shape[1:3])
    font = ImageFont.load_default(FONT_SIZE)
    left, step = LEGEND_WIDTH, size[0] + CAPTION_HEIGHT
    width = left + max(len(row.tiles) * (size[1] + GAP) for row in rows)
    canvas = Image.new("RGB", (width, len(rows) * step + GAP), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for number, row in enumerate(rows):
        top = number * step
        canvas.paste(Image.fromarray(tile_row(row.tiles, size)), (left, top + CAPTION_HEIGHT))
        pen.text((left - 2 * GAP, top + CAPTION_HEIGHT / 2), row.caption, fill=TEXT, font=font, anchor="rm")
        for column, note in enumerate(row.notes):
            right = left + column * (size[1] + GAP) + size[1]
            pen.text((right, top + CAPTION_HEIGHT / 2), note, fill=FAINT, font=font, anchor="rm")
        if row.legend is not None:
            canvas.paste(Image.fromarray(row.legend), (0, top + CAPTION_HEIGHT))
    return np.asarray(canvas)


def colour_depth(distance: np.ndarray, near: float, far: float) -> np.ndarray:
    """Draw distances on a logarithmic scale with the perceptually uniform colour map "inferno", near ones bright.

    Args:
        distance: float[B, H, W]; NaN where nothing was measured, drawn in grey.
        near: Distance of the brightest colour.
        far: Distance of black.

    Returns:
        uint8[B, H, W, 3], RGB.
    """
    with np.errstate(invalid="ignore"):
        level = 1 - np.log(np.maximum(distance, near) / near) / np.log(far / near)
        levels = (np.clip(level, 0, 1) * 255).round().astype(np.uint8)
    pictures = np.stack([cv2.applyColorMap(level, cv2.COLORMAP_INFERNO)[..., ::-1] for level in levels])
    pictures[np.isnan(distance)] = NOT_MEASURED
    return pictures


def depth_legend(height: int, near: float, far: float) -> np.ndarray:
    """Draw the scale of `colour_depth`, uint8[height, LEGEND_WIDTH, 3]."""
    legend = Image.new("RGB", (LEGEND_WIDTH, height), BACKGROUND)
    pen, font = ImageDraw.Draw(legend), ImageFont.load_default(FONT_SIZE)
    left = LEGEND_WIDTH - BAR_WIDTH - 2 * GAP
    distances = near * (far / near) ** np.linspace(0, 1, height)
    bar = colour_depth(np.repeat(distances[None, :, None], BAR_WIDTH, 2), near, far)[0]
    legend.paste(Image.fromarray(bar), (left, 0))
    for part, anchor in ((0.0, "rt"), (0.5, "rm"), (1.0, "rb")):
        distance = near * (far / near) ** part
        text = f"{distance:.0f}" if distance >= 100 else f"{distance:.2g}"
        pen.text((left - GAP, part * (height - 1)), text, fill=FAINT, font=font, anchor=anchor)
    return np.asarray(legend)


def colour_flow(flow: np.ndarray, speed: float) -> np.ndarray:
    """Draw flow as colours: hue is the direction, brightness the speed.

    Args:
        flow: float32[..., h, w, 2], (dx, dy); NaN where nothing was measured, drawn in grey.
        speed: Speed at full brightness, in the unit of the flow.

    Returns:
        uint8[..., h, w, 3], RGB.
    """
    rows = np.nan_to_num(flow).reshape(-1, flow.shape[-2], 2)
    magnitude, angle = cv2.cartToPolar(np.ascontiguousarray(rows[..., 0]), np.ascontiguousarray(rows[..., 1]))
    value = np.minimum(1, magnitude / speed)
    hsv = np.stack([angle * (90 / np.pi), 200 * np.sqrt(value), 32 + 223 * value], -1)  # at rest: dark grey
    colours = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB).reshape(*flow.shape[:-1], 3)
    colours[np.isnan(flow).any(-1)] = NOT_MEASURED
    return colours


def flow_legend(height: int, speed: float) -> np.ndarray:
    """Draw the wheel of `colour_flow` with the speed at its rim, uint8[height, LEGEND_WIDTH, 3]."""
    legend = Image.new("RGB", (LEGEND_WIDTH, height), BACKGROUND)
    pen, font = ImageDraw.Draw(legend), ImageFont.load_default(FONT_SIZE)
    radius = max(8, min(LEGEND_WIDTH // 2, height - CAPTION_HEIGHT) // 2)
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float32) * np.float32(speed / radius)
    wheel = colour_flow(np.stack([x, y], -1), speed)
    wheel[np.hypot(x, y) > speed] = BACKGROUND
    left = LEGEND_WIDTH - 2 * GAP - len(wheel)
    legend.paste(Image.fromarray(wheel), (left, 0))
    centre = left + radius
    pen.text((centre, len(wheel) + GAP / 2), f"rim {speed:.3g} px", fill=FAINT, font=font, anchor="mt")
    return np.asarray(legend)
