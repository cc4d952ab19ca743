"""Page and figure that show decoded clips next to the true ones."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from owl.viz.film import as_array, enlarged, fitting, write_film
from owl.viz.pictures import BACKGROUND, FAINT, GAP, TEXT

MAGNIFICATION = 4
FRAME = (250, 204, 21)  # colour of the rectangle around the detail
TRUTH = "truth"
FIGURE_BYTES = 200_000
FIGURE_CLIPS = 3
FIGURE_TILE = 320  # pixels: narrower pictures are enlarged by an integer factor, wider ones reduced
FIGURE_FONT = 22


@dataclass(frozen=True)
class Detail:
    """The place of a clip that is shown magnified: a frame, and a rectangle in pixels."""

    frame: int
    top: int
    left: int
    height: int
    width: int

    def of(self, pictures: Tensor) -> Tensor:
        """Cut it from uint8[T, 3, H, W]: uint8[3, height, width]."""
        rows, columns = slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)
        return pictures[self.frame, :, rows, columns]


@dataclass(frozen=True)
class ShownClip:
    """A clip and its decoded versions.

    Attributes:
        source: Where it is from.
        pictures: uint8[T, 3, H, W] by name, `TRUTH` first.
        captions: Text below each, such as its PSNR.
        detail: The magnified place; see `find_detail`.
    """

    source: str
    pictures: dict[str, Tensor]
    captions: dict[str, str]
    detail: Detail


@dataclass(frozen=True)
class Column:
    """A metric of the table.

    Attributes:
        name: Its name in the values.
        label: Heading.
        digits: Decimals.
        better: "higher" or "lower", or "" if neither is.
        unit: Unit of the displayed value.
        scale: The displayed value is the value times this.
    """

    name: str
    label: str
    digits: int
    better: Literal["higher", "lower", ""]
    unit: str = ""
    scale: float = 1.0

    def text(self, value: float) -> str:
        """Format a value."""
        return f"{value * self.scale:.{self.digits}f}"

    def best(self, values: dict[str, dict[str, float]]) -> set[str]:
        """Return the names with the best value as displayed; none if they are all equal."""
        shown = {name: float(self.text(row[self.name])) for name, row in values.items() if self.name in row}
        if not self.better or len(set(shown.values())) < 2:
            return set()
        best = max(shown.values()) if self.better == "higher" else min(shown.values())
        return {name for name, value in shown.items() if value == best}


def find_detail(versions: Sequence[Tensor]) -> Detail:
    """Find the frame and rectangle in which versions of a clip differ most from each other, where there is detail.

    The deviation between the versions is weighted by the gradient of the first one: otherwise a single bad decoder
    would lead to a black wall.

    Args:
        versions: Each uint8[T, 3, H, W]; usually the true frames first.
    """
    height, width = (max(1, side // MAGNIFICATION) for side in versions[0].shape[-2:])
    highest, found = -1.0, Detail(0, 0, 0, height, width)
    for number, frames in enumerate(zip(*versions, strict=True)):
        images = torch.stack(frames).double()
        deviation = images.var(0, unbiased=False).mean(0).sqrt()
        across, down = (images[0].diff(dim=dim).abs().mean(0) for dim in (2, 1))
        gradient = F.pad(across, (0, 1)) + F.pad(down, (0, 0, 0, 1))
        total = F.pad(
            (deviation * (1 + gradient)).cumsum(0).cumsum(1), (1, 0, 1, 0)
        )  # sums over all rectangles by four differences
        sums = total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]
        if (value := float(sums.max())) > highest:
            top, left = divmod(int(sums.argmax()), sums.shape[1])
            highest, found = value, Detail(number, top, left, height, width)
    return found


def page(
    title: str,
    facts: dict[str, str],
    columns: list[Column],
    values: dict[str, dict[str, float]],
    notes: list[str],
    heading: str,
    clips: list[ShownClip],
    fps: float,
    command: str,
    kind: str = "decoder",
) -> str:
    """Return a page of HTML that contains everything it shows.

    Args:
        title: Heading.
        facts: Facts about the comparison, by label.
        columns: Of the table.
        values: Metrics of each decoder or world model.
        notes: Sentences below the table.
        heading: Above the clips.
        clips: Shown below, as films if they have several frames.
        fps: Frames per second.
        command: Command line that repeats the comparison.
        kind: What is compared.
    """
    folder = files("owl.viz") / "templates"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((folder / "comparison.html").read_text(encoding="utf-8"))
    best = {column.name: column.best(values) for column in columns}
    return template.render(
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script=(folder / "films.js").read_text(encoding="utf-8"),
        title=title,
        facts=facts,
        columns=columns,
        values=values,
        best=best,
        notes=notes,
        heading=heading,
        clips=[_section(clip, fps) for clip in clips],
        moving=any(len(clip.pictures[TRUTH]) > 1 for clip in clips),
        magnification=MAGNIFICATION,
        command=command,
        kind=kind,
    )


def _section(clip: ShownClip, fps: float) -> dict[str, Any]:
    """Return the content of a clip's section, with pictures and films as data URLs."""
    detail, (height, width) = clip.detail, clip.pictures[TRUTH].shape[-2:]
    box = {
        "top": detail.top / height,
        "left": detail.left / width,
        "height": detail.height / height,
        "width": detail.width / width,
    }
    tiles = [
        {
            "name": name,
            "caption": clip.captions.get(name, ""),
            "picture": _url("image/png", _png(as_array(pictures[detail.frame]))),
            "detail": _url("image/png", _png(as_array(detail.of(pictures)))),
        }
        for name, pictures in clip.pictures.items()
    ]
    return {
        "source": clip.source,
        "ratio": width / height,
        "box": {side: round(share, 6) for side, share in box.items()},
        "tiles": tiles,
        "captioned": bool(clip.captions),
        "film": _url("video/mp4", _mp4(clip, fps)) if len(clip.pictures[TRUTH]) > 1 else "",
    }


def figure(clips: list[ShownClip], footers: dict[str, str], largest: int = FIGURE_BYTES) -> bytes:
    """Draw one frame of some clips with its magnified detail, a column for each version, as a PNG for a README.

    Args:
        clips: The first of them are drawn, fewer or with fewer colours if the file would be too large.
        footers: Text below each column.
        largest: Bytes of the file.
    """
    for count in range(min(FIGURE_CLIPS, len(clips)), 0, -1):
        picture = Image.fromarray(_draw_figure(clips[:count], footers))
        for colours in (256, 128):
            content = _png(picture.quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG))
            if len(content) <= largest:
                return content
    return content


def _draw_figure(clips: list[ShownClip], footers: dict[str, str]) -> np.ndarray:
    names = list(clips[0].pictures)
    height, width = clips[0].pictures[TRUTH].shape[-2:]
    factor = max(1, FIGURE_TILE // width) if width <= FIGURE_TILE else FIGURE_TILE / width
    tile = (round(height * factor), round(width * factor))
    font, small = ImageFont.load_default(FIGURE_FONT), ImageFont.load_default(FIGURE_FONT - 4)
    line = FIGURE_FONT + GAP
    below = line if any(clip.captions for clip in clips) else GAP
    block = 2 * (tile[0] + GAP) + below + GAP
    canvas = Image.new(
        "RGB", (len(names) * (tile[1] + GAP) + GAP, line + GAP + len(clips) * block + line + GAP), BACKGROUND
    )
    pen = ImageDraw.Draw(canvas)
    for column, name in enumerate(names):
        left = GAP + column * (tile[1] + GAP)
        middle = left + tile[1] / 2
        pen.text((middle, GAP + line / 2), fitting(name, font, tile[1]), fill=TEXT, font=font, anchor="mm")
        for row, clip in enumerate(clips):
            top = GAP + line + row * block
            detail = clip.detail
            method = Image.Resampling.BOX if factor < 1 else Image.Resampling.NEAREST
            whole = Image.fromarray(as_array(clip.pictures[name][detail.frame])).resize((tile[1], tile[0]), method)
            cut = Image.fromarray(as_array(detail.of(clip.pictures[name])))
            canvas.paste(whole, (left, top))
            canvas.paste(cut.resize((tile[1], tile[0]), Image.Resampling.NEAREST), (left, top + tile[0] + GAP))
            x, y = left + detail.left * factor, top + detail.top * factor
            pen.rectangle((x, y, x + detail.width * factor, y + detail.height * factor), outline=FRAME, width=2)
            caption = (middle, top + 2 * (tile[0] + GAP) + line / 2)
            pen.text(caption, clip.captions.get(name, ""), fill=FAINT, font=small, anchor="mm")
        footer = fitting(footers.get(name, ""), font, tile[1])
        pen.text((middle, canvas.height - GAP - line / 2), footer, fill=TEXT, font=font, anchor="mm")
    return np.asarray(canvas)


def _png(picture: np.ndarray | Image.Image) -> bytes:
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, "PNG", optimize=True)
    return file.getvalue()


def _mp4(clip: ShownClip, fps: float) -> bytes:
    """Encode the versions of a clip below each other in one film."""
    frames = (
        np.concatenate([enlarged(as_array(picture)) for picture in versions])
        for versions in zip(*clip.pictures.values(), strict=True)
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        write_film(path, frames, fps)
        return path.read_bytes()


def _url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
