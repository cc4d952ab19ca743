"""Media files opened with PyAV: selection of tracks, demultiplexing and decoding."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer
from av.stream import Disposition, Stream

CLOCK_MAY_JUMP = 0x0200
"""AVFMT_TS_DISCONT of FFmpeg's libavformat/avformat.h: the format allows discontinuous time stamps."""
NOT_VIDEO = {"image2", "tty", "txt"}  # formats that FFmpeg offers for pictures and for any text
Shifts = Sequence[tuple[int, Fraction]]
"""(number of the first packet, seconds added to its time stamps and to those of all packets up to the next entry)."""


class UnreadableVideoError(ValueError):
    """A file is not a usable video; the message contains the reason."""


def open_media(path: Path) -> InputContainer:
    """Open a file for reading.

    Raises:
        UnreadableVideoError: It is a picture, a text or the like.
        av.FFmpegError: FFmpeg cannot read it.
    """
    # without the protocol, FFmpeg parses text before a colon in the name as one
    container = av.open(f"file:{path}", metadata_errors="replace")
    if container.format.name in NOT_VIDEO or container.format.name.endswith("_pipe"):
        container.close()
        raise UnreadableVideoError(f"it is {container.format.long_name or container.format.name}, not a video")
    return container


def video_track(container: InputContainer) -> av.VideoStream:
    """Return the video track that players show: the one marked as default, else the first.

    Raises:
        UnreadableVideoError: There is no video track, or no decoder for it.
    """
    # cover pictures of music files are video streams of one frame
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise UnreadableVideoError("it has no video track")
    stream = _default(streams)
    if stream.codec_context is None:
        raise UnreadableVideoError("there is no decoder for its video track")
    stream.thread_type = "AUTO"
    return stream


def audio_track(container: InputContainer) -> av.AudioStream | None:
    """Return the audio track that players play: the one marked as default, else the first that can be decoded."""
    streams = [s for s in container.streams.audio if s.codec_context is not None]
    return _default(streams) if streams else None


def packets(container: InputContainer, *streams: Stream) -> Iterator[av.Packet]:
    """Demultiplex up to the end or to the first damage; truncated packets are skipped."""
    # in these formats every packet that ends at a joint is marked, whole or not; the decoder finds out which
    keep_all = bool(container.format.flags & CLOCK_MAY_JUMP)
    try:
        for packet in container.demux(*streams):
            if keep_all or not packet.is_corrupt:
                yield packet
    except av.FFmpegError:
        return


def decode(container: InputContainer, stream: Stream, shifts: Shifts = ()) -> Iterator[Any]:
    """Yield the frames of a track in presentation order; damaged frames are skipped.

    Args:
        container: The open file.
        stream: One of its tracks.
        shifts: Corrections of the time stamps.
    """
    for number, packet in enumerate(packets(container, stream)):
        shift = next((seconds for first, seconds in reversed(shifts) if number >= first), None)
        if shift and packet.time_base:
            ticks = round(shift / packet.time_base)
            packet.pts = None if packet.pts is None else packet.pts + ticks
            packet.dts = None if packet.dts is None else packet.dts + ticks
        try:
            yield from packet.decode()
        except av.FFmpegError:
            continue


def decode_pictures(container: InputContainer, stream: av.VideoStream, shifts: Shifts = ()) -> Iterator[av.VideoFrame]:
    """Decode a video track without the frames that are damaged, and with interlaced ones made progressive.

    Two fields become one frame (FFmpeg's bwdif), so the rate stays.
    """
    graph: av.filter.Graph | None = None
    shape = None
    for frame in decode(container, stream, shifts):
        if frame.is_corrupt:
            continue
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        if graph is None or shape != (frame.width, frame.height, frame.format.name):
            if graph is not None:
                yield from _filtered(graph, None)
            graph, shape = _deinterlacer(frame), (frame.width, frame.height, frame.format.name)
        yield from _filtered(graph, frame)
    if graph is not None:
        yield from _filtered(graph, None)


def frame_time(frame: av.VideoFrame | av.AudioFrame) -> Fraction | None:
    """Return the presentation time of a frame, in seconds of the container's clock; None if it has none."""
    return None if frame.pts is None or frame.time_base is None else Fraction(frame.pts * frame.time_base)


def _default(streams: Sequence[Any]) -> Any:
    return max(streams, key=lambda stream: bool(stream.disposition & Disposition.default))  # the first of equals


def _deinterlacer(frame: av.VideoFrame) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(template=frame)  # type: ignore[arg-type]
    deinterlace = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    graph.link_nodes(source, deinterlace, graph.add("buffersink")).configure()
    return graph


def _filtered(graph: av.filter.Graph, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
    """Push a frame, None at the end, and yield the frames that are ready."""
    graph.push(frame)
    while True:
        try:
            yield graph.pull()  # type: ignore[misc]
        except (av.BlockingIOError, av.EOFError):
            return
