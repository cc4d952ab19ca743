"""Videos: clips side by side, and rollouts with controls below each frame, as H.264 and AAC for every browser."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.container import OutputContainer
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from owl.atomic import atomic_write
from owl.pixels import to_uint8
from owl.viz.pictures import BACKGROUND, FAINT, GAP, TEXT

SMALLEST_WIDTH = 480  # pixels: narrower frames are enlarged by an integer factor, so that the controls are readable
CAPTION = 26  # pixels
ROW = 30  # of controls
FONT_SIZE = 15
PRESSED = (250, 204, 21)
DARK = (24, 24, 27)
IDLE = (63, 63, 70)
SOUND_BITS = 192_000  # per second
QUALITY = "18"  # constant rate factor of x264; lower is better, 18 is visually almost lossless


def write_film(
    path: str | Path,
    pictures: Iterable[np.ndarray],
    fps: float,
    sound: Iterable[np.ndarray] = (),
    sample_rate: int | None = None,
) -> None:
    """Encode pictures and sound as an .mp4, atomically and one at a time, so that memory is constant.

    Args:
        path: Destination.
        pictures: uint8[H, W, 3], all of one size, at least one.
        fps: Pictures per second.
        sound: float[channels, samples] in [-1, 1], one or two channels; the next part is taken after each picture.
        sample_rate: Samples per second; None: no sound.
    """

    def encode(file: BinaryIO) -> None:
        with av.open(file, "w", format="mp4", options={"movflags": "faststart"}) as container:
            film: av.VideoStream | None = None
            track = None if sample_rate is None else SoundTrack(container, sample_rate)
            parts = iter(sound)
            for number, picture in enumerate(pictures):
                if film is None:
                    rate = Fraction(fps).limit_denominator(1001)
                    film = container.add_stream("libx264", rate=rate)
                    film.height, film.width = (side + side % 2 for side in picture.shape[:2])
                    film.pix_fmt = "yuv420p"
                    film.options = {"crf": QUALITY}
                    film.codec_context.time_base = 1 / rate
                even = np.pad(picture, [(0, side % 2) for side in picture.shape[:2]] + [(0, 0)], mode="edge")
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
                frame.pts, frame.time_base = number, film.codec_context.time_base
                container.mux(film.encode(frame))
                if track is not None:
                    track.write(next(parts, None))
            if film is not None:
                container.mux(film.encode(None))
            if track is not None:
                track.end()

    atomic_write(path, encode)


class SoundTrack:
    """The sound of a film, as AAC.

    Args:
        container: The film.
        sample_rate: Samples per second.
    """

    def __init__(self, container: OutputContainer, sample_rate: int) -> None:
        self._container, self._rate = container, sample_rate
        self._stream = container.add_stream("aac", rate=sample_rate, layout="stereo")
        self._stream.bit_rate = SOUND_BITS
        self._samples = 0

    def write(self, part: np.ndarray | None) -> None:
        """Add float[channels, samples]; None, and no samples, add nothing. Mono is played on both sides."""
        if part is None or not part.shape[1]:
            return
        both = np.broadcast_to(part.astype(np.float32).clip(-1, 1), (2, part.shape[1]))
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(both), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = self._rate, self._samples, Fraction(1, self._rate)
        self._samples += part.shape[1]
        self._container.mux(self._stream.encode(frame))

    def end(self) -> None:
        """Write what the encoder has kept."""
        self._container.mux(self._stream.encode(None))


class ControlsPanel:
    """Draw the controls of a frame: a pill for each button, highlighted while it is down, and a bar for each axis.

    Args:
        buttons: Names.
        axes: Names.
        scales: For each axis, the movement that fills its bar.
        width: Width of the panel in pixels.
    """

    def __init__(self, buttons: list[str], axes: list[str], scales: list[float], width: int) -> None:
        self.buttons, self.axes, self.scales, self.width = buttons, axes, scales, width
        self._font = ImageFont.load_default(FONT_SIZE)
        self._places: list[tuple[float, float, float]] = []  # left, top and width of each pill
        x, y = float(GAP), float(GAP)
        for name in buttons:
            length = self._font.getlength(name) + 16
            if x + length > width - GAP and x > GAP:
                x, y = float(GAP), y + ROW
            self._places.append((x, y, length))
            x += length + GAP
        self._axes_top = y + ROW if buttons else float(GAP)
        self.height = round(self._axes_top) + ROW * len(axes) + GAP

    def draw(self, buttons: np.ndarray, axes: np.ndarray) -> np.ndarray:
        """Draw float[number of buttons] and float[number of axes] as uint8[height, width, 3]."""
        picture = Image.new("RGB", (self.width, self.height), BACKGROUND)
        pen = ImageDraw.Draw(picture)
        for (x, y, length), name, down in zip(self._places, self.buttons, buttons, strict=True):
            pen.rounded_rectangle((x, y, x + length, y + ROW - 6), 6, fill=PRESSED if down > 0.5 else IDLE)
            colour = DARK if down > 0.5 else FAINT
            pen.text((x + length / 2, y + ROW / 2 - 3), name, fill=colour, font=self._font, anchor="mm")
        label = max((self._font.getlength(name) for name in self.axes), default=0) + 2 * GAP
        value = self._font.getlength("-000.0") + 2 * GAP
        left, right = label, self.width - value
        centre, half = (left + right) / 2, (right - left) / 2
        for row, (name, movement, scale) in enumerate(zip(self.axes, axes, self.scales, strict=True)):
            y = self._axes_top + row * ROW + ROW / 2 - 3
            pen.text((GAP, y), name, fill=FAINT, font=self._font, anchor="lm")
            pen.rounded_rectangle((left, y - 5, right, y + 5), 5, fill=IDLE)
            end = centre + half * float(np.clip(movement / scale, -1, 1))
            if abs(end - centre) >= 1:
                pen.rectangle((min(centre, end), y - 5, max(centre, end), y + 5), fill=PRESSED)
            pen.line((centre, y - 8, centre, y + 8), fill=FAINT, width=2)
            pen.text((self.width - GAP, y), f"{movement:+.1f}", fill=TEXT, font=self._font, anchor="rm")
        return np.asarray(picture)


def side_by_side(versions: dict[str, Tensor]) -> np.ndarray:
    """Arrange versions of the same clip in columns, each below its caption.

    Args:
        versions: Clips float[T, 3, H, W] by caption, in [-1, 1] or clipped to it.

    Returns:
        uint8[T, height, width, 3], small clips enlarged.
    """
    columns = [
        [captioned(enlarged(frame), caption) for frame in to_uint8(clip.detach().cpu()).movedim(1, -1).numpy()]
        for caption, clip in versions.items()
    ]
    return np.stack([beside(list(row), len(columns)) for row in zip(*columns, strict=True)])


def as_array(picture: Tensor) -> np.ndarray:
    """Convert uint8[3, h, w] to uint8[h, w, 3]."""
    return np.ascontiguousarray(picture.movedim(0, -1).numpy())


def enlarged(picture: np.ndarray) -> np.ndarray:
    """Enlarge a small uint8[H, W, 3] by an integer factor with nearest-neighbour interpolation."""
    factor = -(-SMALLEST_WIDTH // picture.shape[1])
    return picture.repeat(factor, 0).repeat(factor, 1)


def captioned(picture: np.ndarray, caption: str, colour: tuple[int, int, int] = TEXT) -> np.ndarray:
    """Add a line of text above uint8[H, W, 3], shortened in the middle if it is too long."""
    bar = Image.new("RGB", (picture.shape[1], CAPTION), BACKGROUND)
    font = ImageFont.load_default(FONT_SIZE)
    text = fitting(caption, font, picture.shape[1] - 2 * GAP)
    ImageDraw.Draw(bar).text((GAP, CAPTION / 2), text, fill=colour, font=font, anchor="lm")
    return np.concatenate([np.asarray(bar), picture])


def fitting(text: str, font: Any, width: float) -> str:
    """Shorten a text in the middle until it fits."""
    shown, kept = text, len(text)
    while font.getlength(shown) > width and kept > 2:
        kept -= 1
        shown = f"{text[: kept // 2]}...{text[len(text) - (kept - kept // 2) :]}"
    return shown


def beside(pictures: list[np.ndarray], columns: int) -> np.ndarray:
    """Arrange pictures of one size in rows of ``columns``, with gaps."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    canvas = np.empty((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), np.uint8)
    canvas[:] = BACKGROUND
    for number, picture in enumerate(pictures):
        y, x = number // columns * (height + GAP), number % columns * (width + GAP)
        canvas[y : y + height, x : x + width] = picture
    return canvas


def apart(picture: np.ndarray, columns: int) -> list[np.ndarray]:
    """Take the single row of pictures of `beside` apart: views of uint8[H, W, 3]."""
    width = (picture.shape[1] + GAP) // columns - GAP
    return [picture[:, x : x + width] for x in range(0, picture.shape[1], width + GAP)]
