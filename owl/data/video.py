"""Videos read with PyAV: pictures on a grid of constant rate and one size, and sound in step with them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soxr
from av.video.reformatter import Colorspace, VideoReformatter

from owl.data.codecs import resize

SAMPLE_RATE = 44_100
CHANNELS = 2
LONGEST_PAUSE = 60
"""Mean seconds between frames beyond which a video's timestamps are taken for broken."""
NOT_VIDEO = {"image2", "tty", "txt"}  # formats that FFmpeg offers for pictures and for any text
AUDIO_JITTER = 0.02
"""Seconds by which sound may stray from its timestamps, which containers round, before a gap is filled or cut."""


class UnreadableVideoError(ValueError):
    """A file is no video, or none that can be used; the message says why."""


@dataclass(frozen=True)
class VideoFacts:
    """What a look through a video found.

    Attributes:
        path: The file.
        start: Time of the first frame in the container's clock, seconds.
        seconds: From the first frame's beginning to the last one's end.
        rate: Mean frames per second.
        pixel_aspect: Width of a stored pixel over its height.
        size: (H, W) as it is meant to be seen: upright, with square pixels.
        has_audio: Whether there is a sound track.
    """

    path: Path
    start: Fraction
    seconds: Fraction
    rate: Fraction
    pixel_aspect: Fraction
    size: tuple[int, int]
    has_audio: bool

    def frames(self, fps: Fraction) -> int:
        """Number of frames on a grid of constant rate, at least one."""
        return max(1, math.floor(self.seconds * fps + Fraction(1, 2)))


def probe(path: str | Path) -> VideoFacts:
    """Read through a video's packets and decode its first frame.

    Raises:
        UnreadableVideoError: No frame can be decoded, or the timestamps are broken.
    """
    path = Path(path)
    if not path.stat().st_size:
        raise UnreadableVideoError("the file is empty")
    try:
        with _open(path) as container:
            stream = _video_stream(container)
            frame = next(_decode(container, stream), None)
            if frame is None:
                raise UnreadableVideoError("no frame of it can be decoded")
            has_audio = bool(container.streams.audio)
            aspect = Fraction(stream.sample_aspect_ratio or 1)
        with _open(path) as container:
            stream = _video_stream(container)
            count, start, last = 0, Fraction(0), Fraction(0)
            for time in _packet_times(container, stream):
                start, last = (min(start, time), max(last, time)) if count else (time, time)
                count += 1
    except av.FFmpegError as error:
        raise UnreadableVideoError(f"it cannot be read as a video ({error.strerror})") from error
    between = (last - start) / (count - 1) if count > 1 else Fraction(0)
    if between > LONGEST_PAUSE:
        raise UnreadableVideoError(f"its {count} frames claim to last {float(last - start):.0f} s")
    rate = Fraction(stream.average_rate or stream.guessed_rate or 0) or (1 / between if between else Fraction(30))
    # a container's mean rate is wrong where the file is cut short or its rate varies a lot: its frames know better
    if between and not Fraction(9, 10) < rate * between < Fraction(11, 10):
        rate = (1 / between).limit_denominator(1001)
    return VideoFacts(
        path=path,
        start=start,
        seconds=last - start + 1 / rate,
        rate=rate,
        pixel_aspect=aspect,
        size=_shown_size(frame, aspect),
        has_audio=has_audio,
    )


def read_frames(facts: VideoFacts, fps: Fraction) -> Iterator[av.VideoFrame]:
    """Decode a video onto a grid of constant rate: picture t is the one shown at start + t / fps.

    Pictures are repeated or left out where the video's own rate differs. A frame whose timestamp was rounded still
    falls on its own grid point, so a video of the same rate comes through one to one.

    Yields:
        ``facts.frames(fps)`` frames; fewer if the rest of the file cannot be decoded.
    """
    count, shown = facts.frames(fps), 0
    early = Fraction(1, 2) / max(fps, facts.rate)  # a frame this much late is still shown at the grid point before it
    current: av.VideoFrame | None = None
    seen = facts.start
    with _open(facts.path) as container:
        stream = _video_stream(container)
        for number, frame in enumerate(_decode(container, stream)):
            stamp = _time(frame)
            time = stamp if stamp is not None else facts.start + number / facts.rate
            if current is not None:
                while shown < count and facts.start + shown / fps + early < time:
                    yield current
                    shown += 1
            current, seen = frame, max(seen, time)
    if current is None:
        return
    end = seen + 1 / facts.rate - facts.start  # what is missing beyond it was never decoded
    for _ in range(shown, min(count, max(1, math.floor(end * fps + Fraction(1, 2))))):
        yield current


def to_picture(frame: av.VideoFrame, size: tuple[int, int], pixel_aspect: Fraction = Fraction(1)) -> np.ndarray:
    """Convert a decoded frame to RGB, upright, scaled to cover ``size`` and cut to it about its centre.

    Safe to call on one frame from several threads.

    Returns:
        uint8[H, W, 3].
    """
    # files of high definition that do not say so use BT.709, FFmpeg would take BT.601
    unknown = frame.colorspace in (0, 2)
    colorspace = Colorspace.ITU709 if unknown and frame.height >= 720 else None
    rgb = VideoReformatter().reformat(frame, format="rgb24", src_colorspace=colorspace, threads=1).to_ndarray()
    height, width = rgb.shape[:2]
    aspect, turns = float(pixel_aspect), _quarter_turns(frame)
    rgb = np.rot90(rgb, turns)
    if turns % 2:
        height, width, aspect = width, height, 1 / aspect
    # the part of the frame that has the wanted shape; a pixel of it is `aspect` times as wide as high
    scale = max(size[0] / height, size[1] / (width * aspect))
    rows = min(height, max(1, round(size[0] / scale)))
    columns = min(width, max(1, round(size[1] / (scale * aspect))))
    top, left = (height - rows) // 2, (width - columns) // 2
    return resize(np.ascontiguousarray(rgb[top : top + rows, left : left + columns]), size)


class AudioTrack:
    """The sound of a video, in order, resampled to 44.1 kHz stereo; silent where there is none.

    Sample 0 sounds when the first frame is shown.
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


def _open(path: Path) -> av.container.InputContainer:
    container = av.open(str(path), metadata_errors="replace")
    if container.format.name in NOT_VIDEO or container.format.name.endswith("_pipe"):
        container.close()
        raise UnreadableVideoError(f"it is {container.format.long_name or container.format.name}, not a video")
    return container


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    # cover pictures of music files are video streams of one frame
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise UnreadableVideoError("it has no video track")
    streams[0].thread_type = "AUTO"
    return streams[0]


def _packet_times(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[Fraction]:
    """Yield presentation times in seconds of the packets that hold a visible frame, in the order of decoding."""
    number = 0
    for packet in _packets(container, stream):
        if packet.size and not packet.is_discard:
            time = _time(packet)
            yield time if time is not None else number / Fraction(stream.guessed_rate or 30)
            number += 1


def _packets(container: av.container.InputContainer, stream: av.stream.Stream) -> Iterator[av.Packet]:
    """Demultiplex up to the end, or to where the file is damaged; packets that are cut short are left out."""
    try:
        for packet in container.demux(stream):
            if not packet.is_corrupt:
                yield packet
    except av.FFmpegError:
        return


def _decode(container: av.container.InputContainer, stream: av.stream.Stream) -> Iterator[Any]:
    """Yield the frames of a stream in time order; what is damaged is left out."""
    for packet in _packets(container, stream):
        try:
            yield from packet.decode()
        except av.FFmpegError:
            continue


def _time(item: av.Packet | av.VideoFrame | av.AudioFrame) -> Fraction | None:
    """Return when it is presented, in seconds of the container's clock, None if it does not say."""
    stamp = item.pts if item.pts is not None else item.dts
    return None if stamp is None or item.time_base is None else Fraction(stamp * item.time_base)


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Quarter turns counterclockwise that bring the frame upright."""
    return round(frame.rotation / 90) % 4


def _shown_size(frame: av.VideoFrame, pixel_aspect: Fraction) -> tuple[int, int]:
    height, width = frame.height, frame.width
    if pixel_aspect != 1:
        width = max(2, 2 * round(width * pixel_aspect / 2))
    return (width, height) if _quarter_turns(frame) % 2 else (height, width)


def _read_audio(facts: VideoFacts) -> Iterator[np.ndarray]:
    """Yield int16[n, 2] at 44.1 kHz from the first video frame on, placed by timestamp."""
    rate, position = 0, 0  # samples a second of the track, and the number of its next sample
    resampler: soxr.ResampleStream | None = None
    with _open(facts.path) as container:
        for frame in _decode(container, container.streams.audio[0]):
            if not rate:
                rate = frame.sample_rate
                stereo = av.AudioResampler(format="flt", layout="stereo", rate=rate)
                resampler = soxr.ResampleStream(rate, SAMPLE_RATE, CHANNELS) if rate != SAMPLE_RATE else None
            try:
                parts = [part.to_ndarray().reshape(-1, CHANNELS) for part in stereo.resample(frame)]
            except (ValueError, av.FFmpegError):
                continue  # the track changes its format in mid-stream
            time = _time(frame)
            start = position if time is None else round((time - facts.start) * rate)
            for sound in parts:
                if abs(start - position) > AUDIO_JITTER * rate or position == 0:
                    for gap in _silence(start - position, rate):
                        yield from _resampled(resampler, gap)
                    sound = sound[max(0, position - start) :]
                    position = max(position, start)
                yield from _resampled(resampler, sound)
                position += len(sound)
                start = position
        if resampler is not None:
            yield _to_int16(resampler.resample_chunk(np.zeros((0, CHANNELS), np.float32), last=True))


def _silence(samples: int, rate: int) -> Iterator[np.ndarray]:
    """Yield silence a second at a time: a late track must not fill the memory."""
    for first in range(0, samples, rate):
        yield np.zeros((min(rate, samples - first), CHANNELS), np.float32)


def _resampled(resampler: soxr.ResampleStream | None, sound: np.ndarray) -> Iterator[np.ndarray]:
    chunk = sound if resampler is None else resampler.resample_chunk(np.ascontiguousarray(sound))
    if len(chunk):
        yield _to_int16(chunk)


def _to_int16(sound: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(sound * 2**15), -(2**15), 2**15 - 1).astype(np.int16)
