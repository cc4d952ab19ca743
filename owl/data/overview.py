"""A dataset at a glance: figures for a table, and a contact sheet of what was recorded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from owl.data.codecs import resize
from owl.data.reader import ShardReader
from owl.data.sample import LATENTS, SampleDecoder
from owl.data.shards import DatasetInfo, ShardIndex
from owl.viz.pictures import principal_components

BACKGROUND, PANEL, TEXT, MUTED = (18, 20, 26), (32, 36, 45), (236, 239, 244), (140, 148, 163)
SPLIT_COLOURS = {"train": (122, 162, 247), "validation": (158, 206, 106), "test": (224, 175, 104)}
COLUMNS, CELL_WIDTH, GUTTER, GAP, MARGIN, HEADER, WAVE = 6, 216, 184, 4, 24, 92, 44
LATENT_PICTURES = ("latent", "motion_latent")  # [c, h, w], shown by their principal components
PICTURE_ROWS = 9  # rows of pictures on a sheet: fewer episodes are shown where each has depth and flow


class DatasetReader:
    """Single members of a dataset, decoded at the stored size.

    Args:
        url: The dataset's folder, any fsspec URL.

    Raises:
        OwlError: It is no finished dataset of this version.
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
        self._decoder = SampleDecoder(self.info, url, list(self.columns), 1, 1, None, None, 0.0)

    def content(self, modality: str, episode: int, frame: int) -> bytes:
        """The bytes of one member. episode: its position in the index.

        Raises:
            ValueError: The member is absent or cut short.
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

    def decode(self, modality: str, content: bytes) -> np.ndarray:
        """Decode a member's bytes.

        Raises:
            ValueError: They do not decode, or hold something else than dataset.json says.
        """
        return self._decoder.decode(modality, content)

    def frame(self, modality: str, episode: int, frame: int) -> np.ndarray | None:
        """One member decoded; None where it is absent or corrupt."""
        try:
            return self.decode(modality, self.content(modality, episode, frame))
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
    """Episodes, frames and hours of each split, as far as the index has them."""
    frames = {str(name): int(n) for name, n in zip(reader.index.episodes, reader.index.episode_frames, strict=True)}
    summaries = {}
    for split, names in reader.info.splits.items():
        total = sum(frames.get(name, 0) for name in names)
        present = sum(name in frames for name in names)
        summaries[split] = SplitSummary(present, total, total / reader.info.fps / 3600)
    return summaries


def summarize_modalities(reader: DatasetReader) -> dict[str, ModalitySummary]:
    """Members, bytes and encoding of each modality."""
    summaries = {}
    for modality, column in reader.columns.items():
        sizes = reader.index.sizes[:, column]
        facts = [
            f"{key} {value}"
            for key, value in reader.info.modalities[modality].items()
            if key not in ("extension", "direction", "timing") and isinstance(value, str | int | float)
        ]
        if modality in LATENTS:
            facts.append("shape " + "x".join(map(str, reader.info.modalities[modality]["shape"])))
        stored = sizes[sizes >= 0]
        summaries[modality] = ModalitySummary(len(stored), int(stored.sum()), ", ".join(facts))
    return summaries


def draw_contact_sheet(reader: DatasetReader) -> Image.Image:
    """Draw episodes as rows and time as columns, with rgb, depth, flow, latents and sound in rows of their own.

    Latents are shown by their first three principal components as red, green and blue, fitted on what the sheet shows.

    Returns:
        An RGB picture, about 1,500 pixels wide.
    """
    kinds = [modality for modality in ("rgb", "depth", "flow", *LATENT_PICTURES) if modality in reader.columns]
    waveform = "audio" in reader.columns
    episodes = _choose_episodes(reader, max(2, PICTURE_ROWS // max(1, len(kinds))))
    cell_height = round(CELL_WIDTH * reader.info.size[0] / reader.info.size[1])
    block = len(kinds) * (cell_height + GAP) + (WAVE + GAP) * waveform
    width = 2 * MARGIN + GUTTER + COLUMNS * (CELL_WIDTH + GAP) - GAP
    sheet = Image.new("RGB", (width, HEADER + len(episodes) * (block + 20) + MARGIN - 20), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    frames = [np.linspace(0, reader.index.episode_frames[e] - 1, COLUMNS).round().astype(int) for _, e in episodes]
    shown = [(e, int(f)) for (_, e), times in zip(episodes, frames, strict=True) for f in times]
    speed = _flow_scale(reader, shown)
    cell = (cell_height, CELL_WIDTH)
    latents = {kind: _colour_latents(reader, kind, shown, cell) for kind in kinds if kind in LATENT_PICTURES}
    _draw_header(draw, reader, kinds, speed, width)
    for number, ((split, episode), times) in enumerate(zip(episodes, frames, strict=True)):
        top = HEADER + number * (block + 20)
        _draw_label(draw, reader, split, episode, top)
        for column, frame in enumerate(times):
            left = MARGIN + GUTTER + column * (CELL_WIDTH + GAP)
            for row, kind in enumerate(kinds):
                y = top + row * (cell_height + GAP)
                picture = (
                    latents[kind].get((episode, int(frame)))
                    if kind in latents
                    else _picture(reader, kind, episode, int(frame), speed, cell)
                )
                if picture is None:
                    draw.rectangle((left, y, left + CELL_WIDTH - 1, y + cell_height - 1), PANEL)
                    draw.text((left + CELL_WIDTH / 2, y + cell_height / 2), "missing", MUTED, _font(13), anchor="mm")
                else:
                    sheet.paste(Image.fromarray(picture), (left, y))
            _draw_stamp(draw, f"{frame / reader.info.fps:.1f} s", left, top + cell_height if kinds else top)
        if waveform:
            y = top + len(kinds) * (cell_height + GAP)
            _draw_waveform(draw, reader, episode, (MARGIN + GUTTER, y, width - MARGIN, y + WAVE))
            draw.text((MARGIN + GUTTER - 10, y + WAVE / 2), "sound", MUTED, _font(13), anchor="rm")
        for row, kind in enumerate(kinds[1:], 1):
            middle = top + row * (cell_height + GAP) + cell_height / 2
            draw.text((MARGIN + GUTTER - 10, middle), kind, MUTED, _font(13), anchor="rm")
    return sheet


def _choose_episodes(reader: DatasetReader, count: int) -> list[tuple[str, int]]:
    """Pairs of split and position in the index: evenly spaced in train, and one of each other split."""
    positions = {str(name): position for position, name in enumerate(reader.index.episodes)}
    found = {
        split: [positions[name] for name in names if name in positions] for split, names in reader.info.splits.items()
    }
    first, *others = [split for split in found if found[split]] or [""]
    chosen = [(split, found[split][0]) for split in others]
    candidates = found.get(first, [])
    spaced = np.linspace(0, len(candidates) - 1, min(len(candidates), max(1, count - len(chosen)))).round().astype(int)
    return [(first, candidates[i]) for i in spaced] + chosen


def _picture(
    reader: DatasetReader, kind: str, episode: int, frame: int, speed: float, size: tuple[int, int]
) -> np.ndarray | None:
    """uint8[h, w, 3] of a member in colour."""
    array = reader.frame(kind, episode, frame)
    if array is None:
        return None
    if kind == "depth":
        array = cv2.cvtColor(cv2.applyColorMap(array, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    elif kind == "flow":
        array = colour_flow(array, speed)
    return resize(array, size)


def _colour_latents(
    reader: DatasetReader, kind: str, shown: list[tuple[int, int]], size: tuple[int, int]
) -> dict[tuple[int, int], np.ndarray]:
    """uint8[h, w, 3] of each (episode, frame) whose latent can be read, all on the same axes."""
    latents = {(episode, frame): reader.frame(kind, episode, frame) for episode, frame in shown}
    there = {place: latent for place, latent in latents.items() if latent is not None}
    if not there:
        return {}
    components, _ = principal_components(torch.from_numpy(np.stack(list(there.values()))), 3)
    pictures = (components * 255).round().byte().movedim(1, -1).numpy()
    height, width = size  # enlarged without smoothing: a latent's positions are few
    return {
        place: cv2.resize(picture, (width, height), interpolation=cv2.INTER_NEAREST)
        for place, picture in zip(there, pictures, strict=True)
    }


def colour_flow(flow: np.ndarray, speed: float) -> np.ndarray:
    """Hue is the direction, brightness the speed.

    Args:
        flow: float32[h, w, 2], (dx, dy).
        speed: Speed that has full brightness, in the flow's unit.

    Returns:
        uint8[h, w, 3], RGB.
    """
    magnitude, angle = cv2.cartToPolar(flow[..., 0], flow[..., 1])
    value = np.minimum(1, magnitude / speed)
    hsv = np.stack([angle * (90 / np.pi), 200 * np.sqrt(value), 32 + 223 * value], -1)  # at rest: dark grey
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)


def _flow_scale(reader: DatasetReader, shown: list[tuple[int, int]]) -> float:
    if "flow" not in reader.columns:
        return 1.0
    flows = [reader.frame("flow", episode, int(frame)) for episode, frame in shown]
    speeds = [np.linalg.norm(flow, axis=-1).ravel() for flow in flows if flow is not None]
    return max(1.0, float(np.percentile(np.concatenate(speeds), 98))) if speeds else 1.0


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


def _draw_header(
    draw: ImageDraw.ImageDraw, reader: DatasetReader, kinds: Sequence[str], speed: float, width: int
) -> None:
    info = reader.info
    total = int(reader.index.episode_frames.sum())
    draw.text((MARGIN, 20), Path(reader.url).name or reader.url, TEXT, _font(26))
    facts = [
        f"{total:,} frames",
        f"{_duration(total / info.fps)} at {info.fps:g} fps",
        f"{len(reader.index.episodes)} episodes",
        f"{info.size[1]} x {info.size[0]} pixels",
    ]
    draw.text((MARGIN, 56), "   ·   ".join(facts), MUTED, _font(15))
    legend = {
        "depth": "depth: bright = high stored value",
        "flow": f"flow: hue = direction, full brightness = {speed:.0f} px",
    }
    for line, kind in enumerate(kind for kind in kinds if kind in legend):
        draw.text((width - MARGIN, 34 + 20 * line), legend[kind], MUTED, _font(13), anchor="ra")


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


def _draw_waveform(
    draw: ImageDraw.ImageDraw, reader: DatasetReader, episode: int, box: tuple[int, int, int, int]
) -> None:
    """Peaks of up to 240 frames over the whole episode; a flat line is silence."""
    left, top, right, bottom = box
    draw.rectangle((left, top, right - 1, bottom - 1), PANEL)
    count = min(240, int(reader.index.episode_frames[episode]))
    step, middle = (right - left) / count, (top + bottom) / 2
    for bar, frame in enumerate(np.linspace(0, reader.index.episode_frames[episode] - 1, count).round().astype(int)):
        samples = reader.frame("audio", episode, int(frame))
        peak = float(np.abs(samples.astype(np.float32)).max()) / 2**15 if samples is not None and samples.size else 0.0
        height = max(0.5, peak * (bottom - top - 6) / 2)
        x = left + bar * step
        draw.rectangle((x, middle - height, x + max(1.0, step - 2), middle + height), (125, 207, 255))
