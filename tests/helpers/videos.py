"""Small real videos with a flash and a beep at a known time, and OWL Control recordings around them."""

import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE = 30
SIZE = (48, 64)


def picture(frame: int, size: tuple[int, int] = SIZE, flash: bool = False) -> np.ndarray:
    """uint8[H, W, 3]: the frame's number as eight black or white columns, most significant left; white in a flash.

    Columns are wide enough to survive compression, so that :func:`frame_number` reads them back.
    """
    if flash:
        return np.full((*size, 3), 255, np.uint8)
    bits = np.array([(frame >> bit) & 1 for bit in range(7, -1, -1)], np.uint8) * 200 + 20
    row = np.repeat(bits, -(-size[1] // 8))[: size[1]]
    return np.ascontiguousarray(np.broadcast_to(row[None, :, None], (*size, 3)))


def frame_number(rgb: np.ndarray) -> int:
    """Read the number that :func:`picture` drew, from a picture of any size."""
    width = rgb.shape[1]
    centres = [int((column + 0.5) * width / 8) for column in range(8)]
    return int(sum((rgb[:, x].mean() > 127) << (7 - bit) for bit, x in enumerate(centres)))


def make_video(
    path: Path,
    frames: int = 60,
    *,
    rate: Fraction | int = RATE,
    size: tuple[int, int] = SIZE,
    times: Sequence[Fraction] | None = None,
    sound: int | None = None,
    layout: str = "stereo",
    flashes: Sequence[int] = (),
    rotation: int = 0,
    matrix: Sequence[int] | None = None,
    aspect: Fraction | None = None,
    b_frames: int = 0,
    begin: int = 0,
    sound_begin: int | None = None,
    sound_seconds: float | None = None,
    gain: float = 1.0,
    clicks: bool = False,
    codec: str = "libx264",
    sound_codec: str = "aac",
    draw: Callable[[int, tuple[int, int], bool], np.ndarray] = picture,
    movflags: str = "",
) -> Path:
    """Encode a video.

    Args:
        path: Its suffix names the container.
        frames: Number of frames.
        rate: Frames per second.
        size: (H, W).
        times: Seconds at which each frame is shown; the default is a constant rate.
        sound: Sample rate of the sound track, None for none: silence, and a 1 kHz tone during flashes.
        layout: Channels of the sound; the first is twice as loud as the others.
        flashes: Frames that are white and beep.
        rotation: Degrees counterclockwise by which a player should turn the picture.
        matrix: Display matrix, nine numbers as FFmpeg stores them, instead of a rotation.
        aspect: Width of a stored pixel over its height.
        b_frames: Consecutive frames that may be coded from both sides.
        begin: Seconds added to all times, of pictures and sound.
        sound_begin: Seconds added to the times of the sound instead.
        sound_seconds: Length of the sound, instead of that of the pictures.
        gain: Factor of the tone, which clips beyond 2.
        clicks: Whether flashes sound as a click of one sample, see `click`, instead of a tone.
        codec: Of the pictures.
        sound_codec: Of the sound.
        draw: Draws frame (number, size, flash).
        movflags: Options of the .mp4 container.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        video = container.add_stream(codec, rate=rate)
        video.height, video.width, video.pix_fmt = *size, "yuv420p"
        video.codec_context.time_base = Fraction(1, 90_000) if times else 1 / Fraction(rate)
        video.codec_context.thread_count = 1
        if codec == "libx264":
            video.options = {"preset": "ultrafast", "crf": "10", "bf": str(b_frames), "b_strategy": "0"}
        else:
            video.bit_rate = 2_000_000
            video.codec_context.max_b_frames = b_frames
        if rotation:
            video.set_display_rotation(rotation)
        if aspect:
            video.codec_context.sample_aspect_ratio = aspect
        if matrix:
            video.set_display_matrix(matrix)
        if sound:
            audio = container.add_stream(sound_codec, rate=sound, layout=layout)
            seconds = times[-1] + Fraction(1, rate) if times else frames / Fraction(rate)
            beeps, heard = [float(f / Fraction(rate)) for f in flashes], begin if sound_begin is None else sound_begin
            seconds = Fraction(seconds) if sound_seconds is None else sound_seconds
            tone = _tone(float(seconds), sound, beeps, rate)
            tone *= gain
            if clicks:
                tone[:] = 0
                tone[[click(frame, rate, sound) for frame in flashes]] = 0.9
            _encode_sound(container, audio, tone, sound, heard)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(draw(number, size, number in flashes), format="rgb24")
            frame.time_base = video.codec_context.time_base
            frame.pts = round(((times[number] if times else number / Fraction(rate)) + begin) / frame.time_base)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return path


def click(frame: int, rate: Fraction | int, sound: int) -> int:
    """Number of the first sample at ``sound`` samples a second after the beginning of a frame."""
    return math.floor(frame / Fraction(rate) * sound) + 1


def _tone(seconds: float, rate: int, beeps: Sequence[float], fps: Fraction | int) -> np.ndarray:
    """A sine of 1 kHz during the frames that start at ``beeps``, else silence."""
    time = np.arange(round(seconds * rate)) / rate
    heard = np.zeros(len(time), bool)
    for beep in beeps:
        heard |= (time >= beep) & (time < beep + 1 / fps)
    return np.where(heard, 0.5 * np.sin(2 * np.pi * 1000 * time), 0)


def _encode_sound(
    container: av.container.OutputContainer, stream: av.AudioStream, tone: np.ndarray, rate: int, begin: int
) -> None:
    channels = stream.layout.nb_channels
    samples = np.stack([tone] + [tone / 2] * (channels - 1)).astype(np.float32)
    for first in range(0, len(tone), 1024):
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples[:, first : first + 1024]), format="fltp", layout=stream.layout.name
        )
        frame.sample_rate, frame.pts, frame.time_base = rate, first + begin * rate, Fraction(1, rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


VIDEO_START = 1_758_000_123.456789  # unix seconds


def make_recording(
    folder: Path, events: Sequence[tuple[float, str, list]], frames: int = 60, *, rate: int = RATE, ended: bool = True
) -> Path:
    """Write an OWL Control recording.

    Args:
        folder: Where recording.mp4, inputs.csv and metadata.json go.
        events: (seconds since VIDEO_START, type, arguments).
        frames: Frames of the video.
        rate: Its frames per second.
        ended: Whether VIDEO_END and END are logged.
    """
    make_video(folder / "recording.mp4", frames, rate=rate)
    rows = [(-1.0, "START", []), (-0.5, "HOOK_START", []), (0.0, "VIDEO_START", []), *events]
    if ended:
        rows += [(frames / rate, "VIDEO_END", []), (frames / rate + 0.1, "END", [])]
    rows.sort(key=lambda row: row[0])
    lines = [f'{VIDEO_START + time!r},{event},"{json.dumps(arguments)}"\n' for time, event, arguments in rows]
    (folder / "inputs.csv").write_text("timestamp,event_type,event_args\n" + "".join(lines))
    (folder / "metadata.json").write_text(json.dumps({"game_exe": "game.exe", "duration": frames / rate}))
    return folder
