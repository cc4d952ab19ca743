"""Presentation times of a video's frames and sound, from the time stamps of its packets."""

from array import array
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate, pairwise

import av
import numpy as np
from av.container import InputContainer

from owl.data.media import CLOCK_MAY_JUMP, Shifts, UnreadableVideoError, packets

LONGEST_PAUSE = 60
"""Mean seconds between frames above which a video's time stamps are invalid."""
LONG_STILL = 30
"""Seconds without a new frame that are remarked on; a silent track whose clock may jump is taken to have jumped."""
BACKWARD = 0.1
"""Seconds by which stamps may run backwards before it counts as a jump; FFmpeg's own limit."""
FORWARD = 1.0
"""Seconds that picture and sound must skip together, and by which they may differ, to be one jump of the clock."""
SPAN = 8
"""Frames over which an interval is averaged, so that rounded or bursty stamps do not give a higher rate."""
HIGHEST_RATE = 1000
"""Frames per second above which time stamps are unreliable."""
UNHEARD = 0.5
"""Seconds by which sound may start later, or end earlier or later, than the picture without a remark."""


@dataclass(frozen=True)
class Timing:
    """Times of a video, in seconds of its container's clock after the shifts.

    Attributes:
        start: When the first frame is shown.
        seconds: From the first frame's beginning to the last one's end.
        rate: Typical frames per second while the picture moves.
        stamped: Whether frames have time stamps; if not, frame n is shown at start + n / rate.
        shifts: Corrections of the video's time stamps that make its clock run steadily.
        sound_shifts: The same for the sound.
        problems: Non-fatal problems, one clause each.
    """

    start: Fraction
    seconds: Fraction
    rate: Fraction
    stamped: bool
    shifts: Shifts
    sound_shifts: Shifts
    problems: list[str]


@dataclass
class _Track:
    """Time stamps of a track's packets in ticks, in decoding order; NaN if missing. ``last``: the last one's length."""

    tick: Fraction
    pts: "array[float]" = field(default_factory=lambda: array("d"))
    dts: "array[float]" = field(default_factory=lambda: array("d"))
    visible: bytearray = field(default_factory=bytearray)  # whether a packet holds a frame that is shown
    last: int = 0

    def jumps(self) -> list[tuple[int, float]]:
        """Return (number of the packet, seconds skipped) wherever the clock runs backwards or skips."""
        dts = np.array(self.dts)
        stamped = np.flatnonzero(~np.isnan(dts))
        steps = np.diff(dts[stamped]) * float(self.tick)
        found = np.flatnonzero((steps < -BACKWARD) | (steps > FORWARD))
        return [(int(stamped[k + 1]), float(steps[k])) for k in found]


@dataclass(frozen=True)
class _Splice:
    """A jump of the clock: the first packet after it of each track that jumps, and the seconds that it skips."""

    video: int | None
    sound: int | None
    seconds: float


def measure(container: InputContainer, video: av.VideoStream, sound: av.AudioStream | None) -> Timing:
    """Read all packets of a container that was just opened.

    Raises:
        UnreadableVideoError: The time stamps are broken.
    """
    streams = [stream for stream in (video, sound) if stream is not None]
    tracks = {stream.index: _Track(Fraction(stream.time_base or 1)) for stream in streams}
    for packet in packets(container, *streams):
        track = tracks[packet.stream.index]
        track.dts.append(np.nan if packet.dts is None else packet.dts)
        track.pts.append(track.dts[-1] if packet.pts is None else packet.pts)
        track.visible.append(packet.size > 0 and not packet.is_discard)
        track.last = packet.duration or track.last
    track, heard = tracks[video.index], tracks[sound.index] if sound is not None else None
    splices = _find_splices(track, heard, bool(container.format.flags & CLOCK_MAY_JUMP))
    cuts = [splice.video for splice in splices if splice.video is not None]

    tick, count = track.tick, sum(track.visible)
    shown = np.where(np.frombuffer(track.visible, bool), track.pts, np.nan)
    parts = [np.unique(part[~np.isnan(part)]) for part in np.split(shown, cuts)]
    rate = _typical_rate(parts, video)
    spans = [(int(part[0]) * tick, int(part[-1]) * tick) if len(part) else None for part in parts]
    start = next((span[0] for span in spans if span), Fraction(0))
    if 2 * sum(map(len, parts)) <= count and count > 1:  # they are all equal, or missing
        problem = "its frames have no times of their own and are shown for equally long"
        return Timing(start, count / rate, rate, False, (), (), [problem])
    # AVI stores no times of presentation: FFmpeg guesses them from the order of decoding, which starts when they do
    lead = start - int(np.nanmin(track.dts)) * tick if container.format.name == "avi" else Fraction(0)
    start -= lead
    end = next((span[1] for span in spans if span), Fraction(0)) - lead + 1 / rate
    shifts = [-lead]
    for span in spans[1:]:  # each part continues where the one before it ends
        shifts.append(end - span[0] if span else shifts[-1])
        end = span[1] + shifts[-1] + 1 / rate if span else end
    if (end - start - 1 / rate) / max(count - 1, 1) > LONGEST_PAUSE:
        raise UnreadableVideoError(f"its {count} frames claim to last {float(end - start):.0f} s")

    steps = iter([later - earlier for earlier, later in pairwise(shifts)])
    sound_steps: list[tuple[int, Fraction]] = []
    for splice in splices:
        step = next(steps) if splice.video is not None else Fraction(-splice.seconds)
        if splice.sound is not None:
            sound_steps.append((splice.sound, step))
    sound_steps.sort()
    sound_shifts = list(accumulate(step for _, step in sound_steps))
    problems = _compare_ends(heard, sum(step for _, step in sound_steps), start, end) if heard is not None else []
    if splices:
        times = f"{len(splices)} times, first " if len(splices) > 1 else ""
        problems.append(f"its clock jumps {times}by {splices[0].seconds:+.1f} s; the parts are joined")
    still = max((float(np.diff(part).max() * tick) for part in parts if len(part) > 1), default=0.0)
    if still > LONG_STILL:
        problems.append(f"one picture of it is shown for {still:.0f} s")
    return Timing(
        start=start,
        seconds=end - start,
        rate=rate,
        stamped=True,
        shifts=tuple(zip([0, *cuts], shifts, strict=True)),
        sound_shifts=tuple(zip([first for first, _ in sound_steps], sound_shifts, strict=True)),
        problems=problems,
    )


def _find_splices(video: _Track, sound: _Track | None, may_jump: bool) -> list[_Splice]:
    """Distinguish jumps of the clock from pauses.

    Decreasing time is always a jump. A gap is a pause, in which the last frame is held, unless the format allows
    discontinuous clocks: then it is a jump if the sound has the same gap, or if there is no sound and the pause would
    be long.
    """
    splices, sounds = [], sound.jumps() if sound is not None else []
    for first, seconds in video.jumps():
        partner = next((jump for jump in sounds if abs(jump[1] - seconds) < FORWARD), None)
        if partner is not None and (seconds < 0 or may_jump):
            splices.append(_Splice(first, partner[0], seconds))
            sounds = [jump for jump in sounds if jump[0] > partner[0]]
        elif seconds < 0 or (may_jump and sound is None and seconds > LONG_STILL):
            splices.append(_Splice(first, None, seconds))
    return splices + [_Splice(None, first, seconds) for first, seconds in sounds if seconds < 0]


def _compare_ends(sound: _Track, shift: Fraction | int, start: Fraction, end: Fraction) -> list[str]:
    """Describe sound that covers less or more time than the picture, which lasts from ``start`` to ``end``.

    Args:
        sound: The track.
        shift: Seconds added to the time stamps of its last packets.
        start: When the first frame is shown.
        end: When the last frame ends.
    """
    stamps = np.array(sound.pts)
    stamps = stamps[~np.isnan(stamps)] * float(sound.tick)
    if not len(sound.pts):
        return ["its sound track is empty, it is imported as silence"]
    if not len(stamps):
        return []
    late = stamps[0] - float(start)
    early = float(end - shift) - stamps[-1] - sound.last * float(sound.tick)
    problems = []
    if late > UNHEARD:
        problems.append(f"its sound starts {late:.1f} s after the picture, it is silent until then")
    if early > UNHEARD:
        problems.append(f"its sound ends {early:.1f} s before the picture, it is silent from there on")
    if early < -UNHEARD:
        problems.append(f"its sound is {-early:.1f} s longer than the picture, the rest is left out")
    return problems


def _typical_rate(parts: list[np.ndarray], video: av.VideoStream) -> Fraction:
    """Return the frames per second while the picture moves: long stills do not count, and no moving frame is lost.

    Args:
        parts: Ascending times of frames in ticks, float64[n] each.
        video: The track; a rate that its container names is taken where it fits.
    """
    tick, intervals, span = float(video.time_base or 1), [np.empty(0)], 1
    for part in sorted(parts, key=len):
        span = min(SPAN, max(1, len(part) // SPAN))
        intervals.append((part[span:] - part[:-span]) * tick / span)
    found = np.concatenate(intervals)
    found = found[found * HIGHEST_RATE >= 1]
    named = [Fraction(rate) for rate in (video.average_rate, video.base_rate, video.guessed_rate) if rate]
    if not len(found):
        return named[0] if named else Fraction(30)
    interval = float(found[found <= 1.1 * np.quantile(found, 0.1)].mean())
    nearest = min(named, key=lambda rate: abs(rate * interval - 1), default=Fraction(0))
    if abs(nearest * interval - 1) < 0.005 + tick / (interval * span):  # stamps are rounded to ticks
        return nearest
    return max(Fraction(1 / interval).limit_denominator(1001), Fraction(1, 1001))
