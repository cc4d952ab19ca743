"""Overview of a dataset: statistics for a table, and a contact sheet of the episodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from owl.data.modalities import MODALITIES
from owl.data.modalities.audio import Audio, AudioLevels
from owl.data.modalities.base import Preview, Sampling
from owl.data.reader import ShardReader
from owl.data.shards import DatasetInfo, ShardIndex
from owl.spacing import evenly_spaced

BACKGROUND, PANEL, TEXT, MUTED = (18, 20, 26), (32, 36, 45), (236, 239, 244), (140, 148, 163)
SPLIT_COLOURS = {"train": (122, 162, 247), "validation": (158, 206, 106), "test": (224, 175, 104)}
COLUMNS, CELL_WIDTH, GUTTER, GAP, MARGIN, HEADER, BARS = 6, 216, 184, 4, 24, 92, 44
LISTENED = 2000  # frames whose sound is measured
PICTURE_ROWS = 9  # rows of pictures on a sheet: fewer episodes are shown where each has depth and flow


class DatasetReader:
    """Reader of single members of a dataset, decoded at the stored size.

    Args:
        url: The dataset's folder, any fsspec URL.

    Attributes:
        decoders: Decoders of the modalities supported by OWL; members of others are only available as bytes.

    Raises:
        OwlError: The folder does not contain a finished dataset of this version.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.info = DatasetInfo.load(url)
        self.index = ShardIndex.load(url)
        self.identity = self.info.identity(self.index)
        self.columns = {
            modality: list(self.index.extensions).index(description["extension"])
            for modality, description in self.info.modalities.items()
        }
        self._reader = ShardReader(url, None, self.identity)
        sampling = Sampling(url, self.info.fps, self.info.size)
        self.decoders = {
            name: known(name, self.info.modalities[name], sampling)
            for name, known in MODALITIES.items()
            if name in self.columns
        }

    def content(self, modality: str, episode: int, frame: int) -> bytes:
        """Return the bytes of one member. episode: its position in the index.

        Raises:
            ValueError: The member is absent or truncated.
            OwlError: Its shard is missing.
        """
        row, column = int(self.index.episode_row[episode]) + frame, self.columns[modality]
        offset, size = int(self.index.offsets[row, column]), int(self.index.sizes[row, column])
        if size < 0:
            raise ValueError("it is absent")
        content = self._reader.read(int(self.index.episode_shard[episode]), offset, offset + size)
        if len(content) < size:
            raise ValueError("the shard is cut short")
        return content

    def frame(self, modality: str, episode: int, frame: int) -> np.ndarray | None:
        """Return one decoded member; None if it is absent or corrupt."""
        try:
            return self.decoders[modality].decode(self.content(modality, episode, frame))
        except ValueError:
            return None


@dataclass(frozen=True)
class SplitSummary:
    """Size of one split."""

    episodes: int
    frames: int
    hours: float


@dataclass(frozen=True)
class ModalitySummary:
    """Stored bytes of one modality."""

    frames: int
    bytes: int
    description: str


def summarize_splits(reader: DatasetReader) -> dict[str, SplitSummary]:
    """Count the indexed episodes, frames and hours of each split."""
    frames = {str(name): int(n) for name, n in zip(reader.index.episodes, reader.index.episode_frames, strict=True)}
    summaries = {}
    for split, names in reader.info.splits.items():
        total = sum(frames.get(name, 0) for name in names)
        present = sum(name in frames for name in names)
        summaries[split] = SplitSummary(present, total, total / reader.info.fps / 3600)
    return summaries


def summarize_modalities(reader: DatasetReader) -> dict[str, ModalitySummary]:
    """Return members, bytes and encoding of each modality."""
    summaries = {}
    for modality, column in reader.columns.items():
        sizes = reader.index.sizes[:, column]
        facts = reader.decoders[modality].facts() if modality in reader.decoders else ["unknown to this version of owl"]
        stored = sizes[sizes >= 0]
        summaries[modality] = ModalitySummary(len(stored), int(stored.sum()), ", ".join(facts))
    return summaries


def measure_audio(reader: DatasetReader) -> AudioLevels:
    """Measure the sound of up to 2,000 evenly spaced frames; of none, if the dataset has no sound."""
    levels, ends = AudioLevels(), np.cumsum(reader.index.episode_frames)
    for name in (name for name, decoder in reader.decoders.items() if isinstance(decoder, Audio)):
        for position in evenly_spaced(int(ends[-1]), LISTENED):
            episode = int(np.searchsorted(ends, position, side="right"))
            frame = int(position - (ends[episode] - reader.index.episode_frames[episode]))
            if (sound := reader.frame(name, episode, frame)) is not None:
                levels.add(sound)
    return levels


def draw_contact_sheet(reader: DatasetReader) -> Image.Image:
    """Draw episodes as rows and time as columns, with a separate row for each modality that has a picture.

    Returns:
        An RGB picture, about 1,500 pixels wide.
    """
    cell = (round(CELL_WIDTH * reader.info.size[0] / reader.info.size[1]), CELL_WIDTH)
    kinds = [name for name, decoder in reader.decoders.items() if decoder.preview([], cell) is not None]
    barred = [name for name, decoder in reader.decoders.items() if decoder.levels([]) is not None]
    episodes = _choose_episodes(reader, max(2, PICTURE_ROWS // max(1, len(kinds))))
    block = len(kinds) * (cell[0] + GAP) + len(barred) * (BARS + GAP)
    width = 2 * MARGIN + GUTTER + COLUMNS * (CELL_WIDTH + GAP) - GAP
    sheet = Image.new("RGB", (width, HEADER + len(episodes) * (block + 20) + MARGIN - 20), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    frames = [np.linspace(0, reader.index.episode_frames[e] - 1, COLUMNS).round().astype(int) for _, e in episodes]
    shown = list(dict.fromkeys((e, int(f)) for (_, e), times in zip(episodes, frames, strict=True) for f in times))
    previews = {name: _preview(reader, name, shown, cell) for name in kinds}
    pictures = {name: dict(zip(shown, preview.pictures, strict=True)) for name, preview in previews.items()}
    _draw_header(draw, reader, [preview.legend for preview in previews.values() if preview.legend], width)
    for number, ((split, episode), times) in enumerate(zip(episodes, frames, strict=True)):
        top = HEADER + number * (block + 20)
        _draw_label(draw, reader, split, episode, top)
        for column, frame in enumerate(times):
            left = MARGIN + GUTTER + column * (CELL_WIDTH + GAP)
            for row, name in enumerate(kinds):
                _draw_cell(sheet, pictures[name][episode, int(frame)], left, top + row * (cell[0] + GAP), cell)
            _draw_stamp(draw, f"{frame / reader.info.fps:.1f} s", left, top + cell[0] if kinds else top)
        for row, name in enumerate(barred):
            y = top + len(kinds) * (cell[0] + GAP) + row * (BARS + GAP)
            _draw_bars(draw, reader, name, episode, (MARGIN + GUTTER, y, width - MARGIN, y + BARS))
            draw.text((MARGIN + GUTTER - 10, y + BARS / 2), name, MUTED, _font(13), anchor="rm")
        for row, name in enumerate(kinds[1:], 1):
            middle = top + row * (cell[0] + GAP) + cell[0] / 2
            draw.text((MARGIN + GUTTER - 10, middle), name, MUTED, _font(13), anchor="rm")
    return sheet


def _choose_episodes(reader: DatasetReader, count: int) -> list[tuple[str, int]]:
    """Return pairs of split and position in the index: evenly spaced in train, and one of each other split."""
    positions = {str(name): position for position, name in enumerate(reader.index.episodes)}
    found = {
        split: [positions[name] for name in names if name in positions] for split, names in reader.info.splits.items()
    }
    first, *others = [split for split in found if found[split]] or [""]
    chosen = [(split, found[split][0]) for split in others]
    candidates = found.get(first, [])
    spaced = evenly_spaced(len(candidates), max(1, count - len(chosen)))
    return [(first, candidates[i]) for i in spaced] + chosen


def _preview(reader: DatasetReader, name: str, shown: list[tuple[int, int]], size: tuple[int, int]) -> Preview:
    """Draw the members of the given (episode, frame) pairs."""
    preview = reader.decoders[name].preview((reader.frame(name, *place) for place in shown), size)
    assert preview is not None
    return preview


def _draw_cell(sheet: Image.Image, picture: np.ndarray | None, left: int, top: int, size: tuple[int, int]) -> None:
    height, width = size
    if picture is not None:
        sheet.paste(Image.fromarray(picture), (left, top))
        return
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left, top, left + width - 1, top + height - 1), PANEL)
    draw.text((left + width / 2, top + height / 2), "missing", MUTED, _font(13), anchor="mm")


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _draw_header(draw: ImageDraw.ImageDraw, reader: DatasetReader, legends: Sequence[str], width: int) -> None:
    info = reader.info
    total = reader.index.frames
    draw.text((MARGIN, 20), Path(reader.url).name or reader.url, TEXT, _font(26))
    facts = [
        f"{total:,} frames",
        f"{_duration(total / info.fps)} at {info.fps:g} fps",
        f"{len(reader.index.episodes)} episodes",
        f"{info.size[1]} x {info.size[0]} pixels",
    ]
    draw.text((MARGIN, 56), "   ·   ".join(facts), MUTED, _font(15))
    for line, legend in enumerate(legends):
        draw.text((width - MARGIN, 34 + 20 * line), legend, MUTED, _font(13), anchor="ra")


def _draw_label(draw: ImageDraw.ImageDraw, reader: DatasetReader, split: str, episode: int, top: int) -> None:
    colour = SPLIT_COLOURS.get(split, MUTED)
    draw.rectangle((MARGIN, top, MARGIN + 3, top + 54), colour)
    name, frames = str(reader.index.episodes[episode]), int(reader.index.episode_frames[episode])
    font = _font(15)
    while font.getlength(name) > GUTTER - 20:
        name = "…" + name[2:]  # names differ at the end
    draw.text((MARGIN + 12, top - 1), name, TEXT, font)
    draw.text((MARGIN + 12, top + 20), split, colour, _font(13))
    draw.text((MARGIN + 12, top + 38), f"{frames} frames, {_duration(frames / reader.info.fps)}", MUTED, _font(13))


def _draw_stamp(draw: ImageDraw.ImageDraw, text: str, left: int, bottom: int) -> None:
    font = _font(12)
    draw.rectangle((left, bottom - 18, left + font.getlength(text) + 9, bottom - 1), BACKGROUND)
    draw.text((left + 5, bottom - 9), text, TEXT, font, anchor="lm")


def _draw_bars(
    draw: ImageDraw.ImageDraw, reader: DatasetReader, name: str, episode: int, box: tuple[int, int, int, int]
) -> None:
    """The levels of up to 240 frames over the whole episode; a flat line is none."""
    left, top, right, bottom = box
    draw.rectangle((left, top, right - 1, bottom - 1), PANEL)
    frames = evenly_spaced(int(reader.index.episode_frames[episode]), 240)
    step, middle = (right - left) / len(frames), (top + bottom) / 2
    levels = reader.decoders[name].levels(reader.frame(name, episode, frame) for frame in frames)
    assert levels is not None
    for bar, level in enumerate(levels):
        height = max(0.5, level * (bottom - top - 6) / 2)
        x = left + bar * step
        draw.rectangle((x, middle - height, x + max(1.0, step - 2), middle + height), (125, 207, 255))
