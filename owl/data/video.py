"""Reading of videos with PyAV: pictures at a constant rate and size, with synchronous sound."""

import heapq
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import soxr
from av.sidedata.sidedata import Type
from av.video.reformatter import Colorspace, VideoReformatter

from owl.data.codecs import resize
from owl.data.hdr import TRANSFERS, to_sdr
from owl.data.media import (
    Shifts,
    UnreadableVideoError,
    audio_track,
    decode,
    decode_pictures,
    frame_time,
    open_media,
    video_track,
)
from owl.data.timing import measure

SAMPLE_RATE = 44_100
CHANNELS = 2
AUDIO_JITTER = 0.02
"""Seconds by which sound may stray from its timestamps, which containers round, before a gap is filled or cut."""
REORDERED = 16
"""Frames by which the order of decoding and that of presentation may differ: what H.264 and HEVC allow."""


@dataclass(frozen=True)
class VideoFacts:
    """Properties of a video.

    Attributes:
        path: The file.
        start: Time of the first frame in the container's clock, seconds.
        seconds: From the first frame's beginning to the last one's end.
        rate: Typical frames per second while the picture moves.
        pixel_aspect: Width of a stored pixel over its height.
        size: (H, W) for display: upright, with square pixels.
        has_audio: Whether there is a sound track.
        stamped: Whether frames have time stamps; if not, frame n is shown at start + n / rate.
        reordered: Whether time stamps are permuted among frames, as in AVI, which stores only the decoding order.
        shifts: Corrections of the video's time stamps.
        sound_shifts: The same for the sound.
        problems: Non-fatal problems, one clause each.
    """

    path: Path
    start: Fraction
    seconds: Fraction
    rate: Fraction
    pixel_aspect: Fraction
    size: tuple[int, int]
    has_audio: bool
    stamped: bool = True
    reordered: bool = False
    shifts: Shifts = ()
    sound_shifts: Shifts = ()
    problems: list[str] = field(default_factory=list)

    def frames(self, fps: Fraction) -> int:
        """Number of frames on a grid of constant rate, at least one."""
        return max(1, math.floor(self.seconds * fps + Fraction(1, 2)))


def probe(path: str | Path) -> VideoFacts:
    """Decode a video's first frames and read through its packets.

    Raises:
        UnreadableVideoError: No frame can be decoded, or the timestamps are broken.
    """
    path = Path(path)
    if not path.stat().st_size:
        raise UnreadableVideoError("the file is empty")
    try:
        with open_media(path) as container:
            stream = video_track(container)
            frame, reordered, latest = None, False, None
            for shown in islice(decode_pictures(container, stream), 2 * REORDERED):
                frame, time = frame or shown, frame_time(shown)
                reordered |= time is not None and latest is not None and time < latest
                latest = latest if time is None else time
            if frame is None:
                raise UnreadableVideoError("no frame of it can be decoded")
            aspect = Fraction(stream.sample_aspect_ratio or 1)
        with open_media(path) as container:
            sound = audio_track(container)
            timing = measure(container, video_track(container), sound)
    except av.FFmpegError as error:
        raise UnreadableVideoError(f"it cannot be read as a video ({error.strerror})") from error
    return VideoFacts(
        path=path,
        start=timing.start,
        seconds=timing.seconds,
        rate=timing.rate,
        pixel_aspect=aspect,
        size=_shown_size(frame, aspect),
        has_audio=sound is not None,
        stamped=timing.stamped,
        reordered=reordered,
        shifts=timing.shifts,
        sound_shifts=timing.sound_shifts,
        problems=timing.problems,
    )


def read_frames(facts: VideoFacts, fps: Fraction) -> Iterator[av.VideoFrame]:
    """Decode a video onto a grid of constant rate: picture t is the one shown at start + t / fps.

    Pictures are repeated or dropped if the rate of the video differs. A frame with a rounded timestamp still maps to
    its own grid point, so frames of a video of the same rate map one to one.

    Yields:
        ``facts.frames(fps)`` frames; fewer if the rest of the file cannot be decoded.
    """
    count, shown = facts.frames(fps), 0
    early = Fraction(1, 2) / max(fps, facts.rate)  # a frame this much late is still shown at the grid point before it
    current: av.VideoFrame | None = None
    time = facts.start
    with open_media(facts.path) as container:
        for time, frame in _timed(decode_pictures(container, video_track(container), facts.shifts), facts):
            if current is not None:
                while shown < count and facts.start + shown / fps + early < time:
                    yield current
                    shown += 1
            current = frame
    if current is None:
        return
    end = time + 1 / facts.rate - facts.start  # what is missing beyond it was never decoded
    for _ in range(shown, min(count, max(1, math.floor(end * fps + Fraction(1, 2))))):
        yield current


def _timed(frames: Iterator[av.VideoFrame], facts: VideoFacts) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Yield frames, which are in presentation order, with non-decreasing times.

    Permuted time stamps are sorted within a neighbourhood; a frame without a time stamp follows the previous frame.
    """
    waiting: deque[av.VideoFrame] = deque()
    stamps: list[Fraction] = []
    time = following = facts.start
    for frame in frames:
        stamp = frame_time(frame) if facts.stamped else None
        stamp = following if stamp is None else stamp
        following = max(following, stamp + 1 / facts.rate)
        heapq.heappush(stamps, stamp)
        waiting.append(frame)
        if len(waiting) > (REORDERED if facts.reordered else 0):
            time = max(time, heapq.heappop(stamps))
            yield time, waiting.popleft()
    while waiting:
        time = max(time, heapq.heappop(stamps))
        yield time, waiting.popleft()


def to_picture(frame: av.VideoFrame, size: tuple[int, int], pixel_aspect: Fraction = Fraction(1)) -> np.ndarray:
    """Convert a decoded frame to RGB, upright, scaled to cover ``size`` and cut to it about its centre.

    Safe to call on one frame from several threads.

    Returns:
        uint8[H, W, 3].
    """
    hdr = frame.color_trc in TRANSFERS
    colorspace = None
    if frame.colorspace in (0, 2):  # unspecified: FFmpeg would assume BT.601
        colorspace = Colorspace.BT2020 if hdr else Colorspace.ITU709 if frame.height >= 720 else None
    rgb = (
        VideoReformatter()
        .reformat(frame, format="rgb48le" if hdr else "rgb24", src_colorspace=colorspace, threads=1)
        .to_ndarray()
    )
    rgb, turned = _upright(rgb, frame)
    height, width = rgb.shape[:2]
    aspect = float(1 / pixel_aspect if turned else pixel_aspect)
    # the part of the frame that has the wanted shape; a pixel of it is `aspect` times as wide as high
    scale = max(size[0] / height, size[1] / (width * aspect))
    rows = min(height, max(1, round(size[0] / scale)))
    columns = min(width, max(1, round(size[1] / (scale * aspect))))
    top, left = (height - rows) // 2, (width - columns) // 2
    picture = resize(np.ascontiguousarray(rgb[top : top + rows, left : left + columns]), size)
    return to_sdr(picture, frame.color_trc) if hdr else picture


class AudioTrack:
    """The sound of a video, in order, resampled to 44.1 kHz stereo; silent where there is none.

    Sample 0 is simultaneous with the first frame. The level is kept: a mono track is heard at full level on both
    channels, and more than two channels are mixed down as in ITU-R BS.775, at the level of the front channels.
    """

    def __init__(self, facts: VideoFacts) -> None:
        self._chunks = _read_audio(facts) if facts.has_audio else iter(())
        self._rest = np.zeros((0, CHANNELS), np.int16)

    def read(self, samples: int) -> np.ndarray:
        """Return the next samples, int16[samples, 2]."""
        parts, missing = [], samples
        while missing > 0:
            if not len(self._rest):
                chunk = next(self._chunks, None)
                if chunk is None:
                    parts.append(np.zeros((missing, CHANNELS), np.int16))
                    break
                self._rest = chunk
            parts.append(self._rest[:missing])
            self._rest = self._rest[missing:]
            missing -= len(parts[-1])
        return np.concatenate(parts) if parts else np.zeros((0, CHANNELS), np.int16)


def first_sample(frame: int, fps: Fraction) -> int:
    """Number of the first audio sample that belongs to a frame: round(frame * rate / fps), halves upwards.

    Rounding halves to even numbers, as Python does, would leave some pairs of frames one sample short.
    """
    return math.floor(frame * SAMPLE_RATE / fps + Fraction(1, 2))


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Return (a, b, c, d) of the frame's display matrix: x' = a x + c y, y' = b x + d y (ISO/IEC 14496-12, 6.2.2)."""
    side_data: Any = frame.side_data
    if Type.DISPLAYMATRIX not in side_data:
        return 1, 0, 0, 1
    matrix = np.frombuffer(bytes(side_data[Type.DISPLAYMATRIX]), np.int32)
    return int(matrix[0]), int(matrix[1]), int(matrix[3]), int(matrix[4])


def _turned(frame: av.VideoFrame) -> bool:
    """Return whether width and height are swapped."""
    a, b, c, d = _display_matrix(frame)
    return abs(b) + abs(c) > abs(a) + abs(d)


def _upright(rgb: np.ndarray, frame: av.VideoFrame) -> tuple[np.ndarray, bool]:
    """Apply the display matrix, to quarter turns and mirroring. Returns the picture and whether it was turned."""
    a, b, c, d = _display_matrix(frame)
    turned = _turned(frame)
    if turned:
        rgb, a, d = rgb.swapaxes(0, 1), c, b
    return rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1], turned


def _shown_size(frame: av.VideoFrame, pixel_aspect: Fraction) -> tuple[int, int]:
    height, width = frame.height, frame.width
    if pixel_aspect != 1:
        width = max(2, 2 * round(width * pixel_aspect / 2))
    return (width, height) if _turned(frame) else (height, width)


def _read_audio(facts: VideoFacts) -> Iterator[np.ndarray]:
    """Yield int16[n, 2] at 44.1 kHz from the first video frame on, placed by timestamp."""
    rate, position = 0, 0  # samples a second of the track, and the number of its next sample
    layout: tuple[object, ...] | None = None
    resampler: soxr.ResampleStream | None = None
    with open_media(facts.path) as container:
        track = audio_track(container)
        for frame in decode(container, track, facts.sound_shifts) if track is not None else ():
            if layout != (frame.format.name, frame.layout.name, frame.sample_rate):  # it may change in mid-stream
                layout = (frame.format.name, frame.layout.name, frame.sample_rate)
                # FFmpeg would make a mono track quieter by 3 dB
                mixed = "mono" if frame.layout.nb_channels == 1 else "stereo"
                mixer = av.AudioResampler(format="flt", layout=mixed, rate=frame.sample_rate)
            if rate != frame.sample_rate:
                yield from _resampled(resampler, None)
                position = round(position * frame.sample_rate / rate) if rate else 0
                rate = frame.sample_rate
                resampler = soxr.ResampleStream(rate, SAMPLE_RATE, CHANNELS) if rate != SAMPLE_RATE else None
            time = frame_time(frame)
            frame.pts = None  # placed here
            start = position if time is None else round((time - facts.start) * rate)
            for part in mixer.resample(frame):
                samples = part.to_ndarray().reshape(-1, part.layout.nb_channels)
                sound: np.ndarray = np.broadcast_to(samples, (part.samples, CHANNELS))
                if abs(start - position) > AUDIO_JITTER * rate or position == 0:
                    for gap in _silence(start - position, rate):
                        yield from _resampled(resampler, gap)
                    sound = sound[max(0, position - start) :]
                    position = max(position, start)
                yield from _resampled(resampler, sound)
                position += len(sound)
                start = position
        yield from _resampled(resampler, None)


def _silence(samples: int, rate: int) -> Iterator[np.ndarray]:
    """Yield silence one second at a time, so that a late track does not fill the memory."""
    for first in range(0, samples, rate):
        yield np.zeros((min(rate, samples - first), CHANNELS), np.float32)


def _resampled(resampler: soxr.ResampleStream | None, sound: np.ndarray | None) -> Iterator[np.ndarray]:
    """Resample sound; None ends the stream and flushes the resampler."""
    if resampler is not None:
        rest = np.zeros((0, CHANNELS), np.float32)
        sound = resampler.resample_chunk(np.ascontiguousarray(rest if sound is None else sound), last=sound is None)
    if sound is not None and len(sound):
        yield _to_int16(sound)


def _to_int16(sound: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(sound * 2**15), -(2**15), 2**15 - 1).astype(np.int16)
