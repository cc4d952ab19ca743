"""Time stamps as files have them: of decoding, jumping, missing, uneven. Every frame comes once, in step."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from owl.data.video import AudioTrack, VideoFacts, first_sample, probe, read_frames, to_picture
from tests.helpers.videos import RATE, frame_number, make_video


def numbers(facts: VideoFacts) -> list[int]:
    """The number that each frame of the video's own grid shows."""
    return [frame_number(to_picture(frame, facts.size)) for frame in read_frames(facts, facts.rate)]


def loud(facts: VideoFacts) -> list[int]:
    """The frames during which it is loud."""
    track, frames = AudioTrack(facts), []
    for frame in range(facts.frames(facts.rate)):
        samples = track.read(first_sample(frame + 1, facts.rate) - first_sample(frame, facts.rate))
        if np.abs(samples[:, 0].astype(int)).mean() > 3000:
            frames.append(frame)
    return frames


def remux(path: Path, *parts: tuple[Path, int]) -> Path:
    """Copy the packets of several files into one container, each file from the given second on."""
    with av.open(str(path), "w") as copy:
        targets: dict[int, av.stream.Stream] = {}
        for source, begin in parts:
            with av.open(str(source)) as container:
                for stream in container.streams:
                    if stream.index not in targets:
                        targets[stream.index] = copy.add_stream_from_template(stream)
                for packet in container.demux():
                    if packet.dts is not None:
                        ticks = round(begin / packet.time_base)
                        packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
                        packet.stream = targets[packet.stream.index]
                        copy.mux(packet)
    return path


FORMATS = [("avi", "libx264"), ("avi", "mpeg4"), ("mp4", "libx264"), ("mov", "mpeg4"), ("mkv", "libx264")]
FORMATS += [("ts", "libx264"), ("flv", "libx264"), ("nut", "mpeg4")]


@pytest.mark.parametrize(
    ("suffix", "codec", "b_frames"),
    [(*format, b_frames) for format in FORMATS for b_frames in (0, 1, 3)] + [("mpg", "mpeg2video", 2)],
)
def test_every_frame_comes_once_and_in_step_whatever_the_order_of_decoding(
    tmp_path: Path, suffix: str, codec: str, b_frames: int
) -> None:
    sound_codec = {"mpg": "mp2", "avi": "pcm_s16le"}.get(suffix, "aac")
    path = make_video(
        tmp_path / f"a.{suffix}",
        60,
        codec=codec,
        b_frames=b_frames,
        sound=44_100,
        sound_codec=sound_codec,
        flashes=[20, 41],
    )
    facts = probe(path)
    assert facts.rate == RATE
    assert numbers(facts) == [255 if frame in (20, 41) else frame for frame in range(60)]
    assert loud(facts) == [20, 41]
    assert not facts.problems


@pytest.mark.parametrize("sound", [44_100, None])
@pytest.mark.parametrize("begins", [(0, 50), (50, 0), (0, 3600), (0, 0), (7, 8)])
def test_recordings_joined_end_to_end_are_one(tmp_path: Path, begins: tuple[int, int], sound: int | None) -> None:
    parts = [
        make_video(tmp_path / f"{k}.ts", 60, b_frames=3, sound=sound, flashes=[9, 30], begin=begin)
        for k, begin in enumerate(begins)
    ]
    (tmp_path / "joined.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    facts = probe(tmp_path / "joined.ts")
    assert facts.rate == RATE
    assert numbers(facts) == 2 * [255 if frame in (9, 30) else frame for frame in range(60)]
    assert loud(facts) == ([9, 30, 69, 90] if sound else [])
    assert len(facts.problems) == 1


@pytest.mark.parametrize("frames", [53, 57, 59, 61])
def test_the_frame_before_a_joint_is_kept(tmp_path: Path, frames: int) -> None:
    part = make_video(tmp_path / "a.ts", frames, sound=44_100).read_bytes()  # its packets' counters do not fit
    (tmp_path / "joined.ts").write_bytes(2 * part)
    assert numbers(probe(tmp_path / "joined.ts")) == 2 * list(range(frames))


def test_a_clock_that_jumps_more_than_once_is_corrected_each_time(tmp_path: Path) -> None:
    part = make_video(tmp_path / "a.ts", 30, sound=44_100, flashes=[9]).read_bytes()
    (tmp_path / "joined.ts").write_bytes(4 * part)
    facts = probe(tmp_path / "joined.ts")
    assert numbers(facts) == 4 * [255 if frame == 9 else frame for frame in range(30)]
    assert loud(facts) == [9, 39, 69, 99]


@pytest.mark.parametrize("second", [{"begin": 2, "sound_begin": 0}, {"begin": 0, "sound_begin": 2}])
def test_a_clock_of_picture_or_sound_alone_that_runs_backwards_continues(tmp_path: Path, second: dict) -> None:
    parts = [
        make_video(tmp_path / f"{k}.ts", 60, sound=44_100, flashes=[9, 30], **begin).read_bytes()
        for k, begin in enumerate(({}, second))
    ]
    (tmp_path / "joined.ts").write_bytes(b"".join(parts))
    facts = probe(tmp_path / "joined.ts")
    assert numbers(facts) == 2 * [255 if frame in (9, 30) else frame for frame in range(60)]
    first, second, third, *_, last = loud(facts)
    assert (first, second) == (9, 30)
    # nothing shows whether sound is missing at the joint: it may be out of step by the packets that start and end there
    assert abs(third - 69) <= 2
    assert abs(last - 90) <= 2
    assert len(facts.problems) == 1


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.flv"])
@pytest.mark.parametrize("skip", [5, 48])
@pytest.mark.parametrize("b_frames", [0, 3])
def test_a_pause_where_the_clock_is_steady_is_held(tmp_path: Path, name: str, skip: int, b_frames: int) -> None:
    part = make_video(tmp_path / "part.mp4", 60, b_frames=b_frames, sound=44_100, flashes=[9, 40])
    facts = probe(remux(tmp_path / name, (part, 0), (part, 2 + skip)))
    assert facts.rate == RATE
    shown = [255 if frame in (9, 40) else frame for frame in range(60)]
    assert numbers(facts) == shown + 30 * skip * [59] + shown
    assert loud(facts) == [9, 40, 69 + 30 * skip, 100 + 30 * skip]
    assert len(facts.problems) == (skip > 30)


@pytest.mark.parametrize("name", ["a.ts", "a.mp4"])
@pytest.mark.parametrize("still", [20, 40])
def test_a_picture_that_stands_still_while_the_sound_continues_is_held(tmp_path: Path, name: str, still: int) -> None:
    times = [Fraction(n, 30) if n < 30 else Fraction(n, 30) + still for n in range(60)]
    facts = probe(make_video(tmp_path / name, 60, times=times, sound=44_100))
    assert numbers(facts) == [*range(30), *(30 * still * [29]), *range(30, 60)]
    assert len(facts.problems) == (still > 30)


def test_a_long_still_without_sound_is_held_where_the_clock_is_steady(tmp_path: Path) -> None:
    times = [Fraction(n, 30) if n < 30 else Fraction(n, 30) + 40 for n in range(60)]
    facts = probe(make_video(tmp_path / "a.mp4", 60, times=times))
    assert numbers(facts) == [*range(30), *(1200 * [29]), *range(30, 60)]


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.ts"])
@pytest.mark.parametrize("stills", [[10], [1] * 40, [1, 2, 25]])
def test_stills_do_not_lower_the_rate_at_which_the_picture_moves(tmp_path: Path, name: str, stills: list[int]) -> None:
    times = [Fraction(sum(stills[:n])) for n in range(len(stills))]
    times += [sum(stills) + Fraction(n, 30) for n in range(60)]
    facts = probe(make_video(tmp_path / name, len(times), times=times))
    assert facts.rate == RATE
    held = [number for number, seconds in enumerate(stills) for _ in range(30 * seconds)]
    assert numbers(facts) == held + list(range(len(stills), len(stills) + 60))


@pytest.mark.parametrize(
    ("pattern", "rate"),
    [
        ([4, 6], 24),  # 24 frames a second, captured at 60
        ([4, 4, 4, 4, 4, 4, 4, 4, 4, 8], 30),  # every tenth frame dropped
        ([3, 4, 5, 4], 30),  # a clock that jitters
    ],
)
def test_uneven_times_have_the_rate_at_which_they_move(tmp_path: Path, pattern: list[int], rate: int) -> None:
    steps = [pattern[n % len(pattern)] for n in range(80)]
    times = [Fraction(sum(steps[:n]), 120) for n in range(80)]
    facts = probe(make_video(tmp_path / "a.mp4", 80, rate=60, times=times))
    assert float(facts.rate) == pytest.approx(rate, rel=0.01)
    assert sorted(set(numbers(facts))) == list(range(80))


def test_frames_without_times_are_equally_long(tmp_path: Path) -> None:
    with av.open(str(make_video(tmp_path / "a.mp4", 60))) as container:
        stream = container.streams.video[0]
        with av.open(str(tmp_path / "same.mkv"), "w") as copy:
            target = copy.add_stream_from_template(stream)
            for packet in container.demux(stream):
                if packet.dts is not None:
                    packet.pts = packet.dts = 0
                    packet.stream = target
                    copy.mux(packet)
    facts = probe(tmp_path / "same.mkv")
    assert numbers(facts) == list(range(60))
    assert len(facts.problems) == 1


def test_times_in_disorder_are_put_in_order(tmp_path: Path) -> None:
    with av.open(str(make_video(tmp_path / "a.mp4", 60))) as container:
        stream = container.streams.video[0]
        with av.open(str(tmp_path / "b.mkv"), "w") as copy:
            target = copy.add_stream_from_template(stream)
            packets = [packet for packet in container.demux(stream) if packet.dts is not None]
            times = [packet.pts for packet in packets]
            for number, packet in enumerate(packets):
                packet.pts = times[number ^ 1] + times[1]  # neighbours change places, at the end as well
                packet.stream = target
                copy.mux(packet)
    assert numbers(probe(tmp_path / "b.mkv")) == list(range(60))


def test_a_bare_stream_has_no_times_and_all_its_frames(tmp_path: Path) -> None:
    facts = probe(make_video(tmp_path / "a.m4v", 60, codec="mpeg4"))
    assert numbers(facts) == list(range(60))
