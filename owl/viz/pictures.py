"""Pictures for logs and reports: pure functions from tensors to uint8[H, W, 3]."""

import io

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from owl.pixels import to_uint8

TILE_WIDTHS = (160, 320)  # pixels: smaller images are enlarged by an integer factor, larger ones reduced
LARGE_TILE_WIDTHS = (320, 640)  # where fine detail is compared
GAP = 6
CAPTION_HEIGHT = 24
FONT_SIZE = 13
BACKGROUND = (24, 24, 27)
TEXT = (228, 228, 231)
FAINT = (161, 161, 170)
ERROR_LEVELS = (8, 16, 32, 64, 128, 255)  # ends of the error scale, in steps of 8-bit images
COLOUR_BAR_WIDTH = 120
WRONG = (248, 113, 113)
LINE_HEIGHT = 18  # height of the line of one control below a frame
MOST_CONTROLS = 8  # controls below a clip; those that occur in it are preferred


def png(picture: np.ndarray) -> bytes:
    """Encode uint8[H, W, 3] as PNG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def reconstruction_grid(original: Tensor, reconstruction: Tensor, latent: Tensor) -> np.ndarray:
    """Draw frames side by side, in four labelled rows: original, reconstruction, error, latent.

    The error is the mean absolute difference of the channels, on a perceptually uniform colour map with its scale. The
    latent is shown as its first three principal components as red, green and blue, fitted on the frames of the picture.

    Args:
        original: float[B, 3, H, W] in [-1, 1].
        reconstruction: The same shape; clipped to [-1, 1].
        latent: float[B, c, h, w], any scale.

    Returns:
        uint8[height, width, 3], RGB.
    """
    original, reconstruction = (images.detach().float().cpu().clamp(-1, 1) for images in (original, reconstruction))
    size = tile_size(original.shape[-2], original.shape[-1])
    error = (original - reconstruction).abs().mean(dim=1) * 127.5
    highest = next((level for level in ERROR_LEVELS if error.quantile(0.99) <= level), ERROR_LEVELS[-1])
    components, explained = principal_components(latent, 3)
    psnr = _psnr(original, reconstruction)
    rows = [
        ("original", tile_row(to_bytes(original), size)),
        ("reconstruction", tile_row(to_bytes(reconstruction), size)),
        ("absolute error", tile_row(_coloured(error / highest), size)),
        (
            f"latent {'x'.join(map(str, latent.shape[1:]))}: principal components, {explained:.0%} of its variance",
            tile_row(to_bytes(components * 2 - 1), size),
        ),
    ]
    step = size[0] + CAPTION_HEIGHT
    font = ImageFont.load_default(FONT_SIZE)
    width = max(rows[0][1].shape[1], *(round(font.getlength(caption)) for caption, _ in rows))
    canvas = np.empty((len(rows) * step + GAP, width + 2 * GAP, 3), np.uint8)
    canvas[:] = BACKGROUND
    for number, (_, tiles) in enumerate(rows):
        canvas[number * step + CAPTION_HEIGHT : (number + 1) * step, GAP : GAP + tiles.shape[1]] = tiles
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)

    def write(text: str, x: float, row: int, anchor: str, colour: tuple[int, int, int]) -> None:
        pen.text((x, row * step + CAPTION_HEIGHT / 2), text, fill=colour, font=font, anchor=anchor)

    for number, (caption, _) in enumerate(rows):
        write(caption, GAP, number, "lm", TEXT)
    for column, value in enumerate(psnr):
        write(f"{value:.1f} dB", (column + 1) * (size[1] + GAP), 1, "rm", FAINT)
    left = GAP + pen.textlength("absolute error   0  ", font)
    write("0", left - pen.textlength("  ", font), 2, "rm", FAINT)
    write(f"{highest} of 255", left + COLOUR_BAR_WIDTH + pen.textlength("  ", font), 2, "lm", FAINT)
    bar = _coloured(torch.linspace(0, 1, COLOUR_BAR_WIDTH).expand(1, CAPTION_HEIGHT // 2, -1))[0]
    picture.paste(Image.fromarray(bar), (round(left), 2 * step + CAPTION_HEIGHT // 4))
    return np.asarray(picture)


def comparison_grid(rows: dict[str, Tensor]) -> np.ndarray:
    """Draw versions of the same frames below each other, each enlarged and with its PSNR against the first row.

    Args:
        rows: Frames float[B, 3, H, W] by the caption of their row, in [-1, 1] or clipped to it; the first are the
            originals.

    Returns:
        uint8[height, width, 3], RGB.
    """
    shown = {caption: frames.detach().float().cpu().clamp(-1, 1) for caption, frames in rows.items()}
    original = next(iter(shown.values()))
    size = tile_size(original.shape[-2], original.shape[-1], LARGE_TILE_WIDTHS)
    font = ImageFont.load_default(FONT_SIZE)
    blocks = []
    for number, (caption, frames) in enumerate(shown.items()):
        tiles = tile_row(to_bytes(frames), size)
        block = np.full((CAPTION_HEIGHT + size[0], tiles.shape[1] + 2 * GAP, 3), BACKGROUND, np.uint8)
        block[CAPTION_HEIGHT:, GAP : GAP + tiles.shape[1]] = tiles
        picture = Image.fromarray(block)
        pen = ImageDraw.Draw(picture)
        pen.text((GAP, CAPTION_HEIGHT / 2), caption, fill=TEXT, font=font, anchor="lm")
        for column, value in enumerate(_psnr(original, frames) if number else []):
            right = (column + 1) * (size[1] + GAP)
            pen.text((right, CAPTION_HEIGHT / 2), f"{value:.1f} dB", fill=FAINT, font=font, anchor="rm")
        blocks.append(np.asarray(picture))
    return np.concatenate([*blocks, np.full((GAP, blocks[0].shape[1], 3), BACKGROUND, np.uint8)])


def controls_strip(
    video: Tensor,
    played: tuple[Tensor, Tensor],
    read: tuple[Tensor, Tensor],
    buttons: list[str],
    axes: list[str],
) -> np.ndarray:
    """Draw clips as film strips, with two columns of controls below each frame: true and predicted.

    There is a line for each axis and for each button that occurs in the clip. A wrong prediction is red: another button
    state, or an axis whose error exceeds both a quarter of the true value and one. The first frame of a clip has no
    controls, since they cannot be inferred from a single frame.

    Args:
        video: float[B, T, 3, H, W] in [-1, 1].
        played: Buttons float[B, T, len(buttons)], 0 or 1, and axes float[B, T, len(axes)] in their units.
        read: The same, predicted by a network.
        buttons: Names.
        axes: Names.

    Returns:
        uint8[height, width, 3], RGB.
    """
    size = tile_size(video.shape[-2], video.shape[-1])
    font = ImageFont.load_default(FONT_SIZE)
    margin = 2 * GAP + round(max(font.getlength(name) for name in ["played", *buttons, *axes]))
    strips = []
    for clip in range(len(video)):
        frames = tile_row(to_bytes(video[clip].detach().float().cpu().clamp(-1, 1)), size)
        values = [[part[clip].detach().float().cpu() for part in side] for side in (played, read)]
        occurring = [n for n in range(len(buttons)) if any(side[0][1:, n].any() for side in values)]
        lines = [(name, 1, number) for number, name in enumerate(axes)]
        lines += [(buttons[number], 0, number) for number in occurring]
        lines = lines[:MOST_CONTROLS]
        canvas = np.empty(
            (size[0] + (len(lines) + 1) * LINE_HEIGHT + 2 * GAP, margin + frames.shape[1] + GAP, 3), np.uint8
        )
        canvas[:] = BACKGROUND
        canvas[GAP : GAP + size[0], margin : margin + frames.shape[1]] = frames
        picture = Image.fromarray(canvas)
        pen = ImageDraw.Draw(picture)
        for line, name in enumerate(["", *(name for name, _, _ in lines)]):
            y = GAP + size[0] + (line + 0.5) * LINE_HEIGHT
            pen.text((margin - GAP, y), name, fill=FAINT, font=font, anchor="rm")
            for frame in range(1, video.shape[1]):
                for side in range(2):
                    x = margin + frame * (size[1] + GAP) + size[1] * (0.25 + 0.5 * side)
                    if not line:
                        pen.text((x, y), ("played", "read")[side], fill=FAINT, font=font, anchor="mm")
                        continue
                    _, kind, number = lines[line - 1]
                    true, found = (float(values[k][kind][frame, number]) for k in range(2))
                    differ = abs(found - true) > max(1.0, abs(true) / 4) if kind else found != true
                    colour = WRONG if side and differ else TEXT
                    value = (true, found)[side]
                    if kind:
                        pen.text((x, y), f"{value:+.1f}", fill=colour, font=font, anchor="mm")
                    else:
                        pen.rectangle((x - 5, y - 5, x + 5, y + 5), fill=colour if value else None, outline=colour)
        strips.append(np.asarray(picture))
    return np.concatenate(strips)


def principal_components(latent: Tensor, count: int) -> tuple[Tensor, float]:
    """Project the channels of latents on their first principal components, fitted on this batch.

    Each component is scaled so that its 1st and 99th percentile become 0 and 1. Its sign, which is ambiguous, is chosen
    such that its largest weight is positive, so that the colours are consistent between training steps.

    Args:
        latent: float[B, c, h, w].
        count: Number of components; those beyond c are 0.5, as are components without any variance.

    Returns:
        float[B, count, h, w] in [0, 1], and their fraction of the variance, 1 for a constant latent.
    """
    values = latent.detach().float().cpu().movedim(1, -1)
    samples = values.flatten(0, -2)
    samples = samples - samples.mean(dim=0)
    variances, axes = torch.linalg.eigh(samples.T @ samples / len(samples))
    variances, axes = variances.flip(0).clamp(min=0)[:count], axes.flip(1)[:, :count]
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    projected = samples @ axes
    low, high = projected.quantile(torch.tensor([0.01, 0.99]), dim=0)
    scaled = torch.where(high > low, (projected - low) / (high - low).clamp(min=1e-12), torch.tensor(0.5)).clamp(0, 1)
    scaled = F.pad(scaled, (0, count - scaled.shape[1]), value=0.5)
    total = samples.square().sum(dim=1).mean().item()
    explained = variances.sum().item() / total if total > 0 else 1.0
    return scaled.view(*values.shape[:-1], count).movedim(-1, 1), explained


def tile_size(height: int, width: int, widths: tuple[int, int] = TILE_WIDTHS) -> tuple[int, int]:
    """Return the (height, width) at which pictures of (height, width) are shown."""
    smallest, largest = widths
    if width > largest:
        return max(1, round(height * largest / width)), largest
    factor = -(-smallest // width)
    return height * factor, width * factor


def to_bytes(images: Tensor) -> np.ndarray:
    """Convert float[B, 3, H, W] in [-1, 1] to uint8[B, H, W, 3]."""
    return to_uint8(images).movedim(1, -1).numpy()


def _psnr(original: Tensor, frames: Tensor) -> list[float]:
    """Return the PSNR of each frame, of float[B, 3, H, W] in [-1, 1], in dB."""
    return (-10 * torch.log10((original - frames).square().mean(dim=(1, 2, 3)) / 4)).tolist()


def _coloured(values: Tensor) -> np.ndarray:
    """Map float[B, H, W], clipped to [0, 1], to uint8[B, H, W, 3] with the colour map "inferno"."""
    levels = (values.clamp(0, 1) * 255).round().byte().numpy()
    return np.stack([cv2.applyColorMap(level, cv2.COLORMAP_INFERNO)[..., ::-1] for level in levels])


def tile_row(tiles: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8[B, h, w, 3] to tiles with nearest-neighbour interpolation, and arrange them side by side."""
    height, width = size
    row = np.empty((height, len(tiles) * (width + GAP) - GAP, 3), np.uint8)
    row[:] = BACKGROUND
    for column, tile in enumerate(tiles):
        method = cv2.INTER_NEAREST if tile.shape[1] <= width else cv2.INTER_AREA
        left = column * (width + GAP)
        row[:, left : left + width] = cv2.resize(tile, (width, height), interpolation=method)
    return row
