"""Files as players open them: any name, the default track, and interlaced frames made whole."""

import os
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from owl.data.media import UnreadableVideoError
from owl.data.video import SAMPLE_RATE, AudioTrack, probe, read_frames, to_picture
from tests.helpers.videos import SIZE, frame_number, make_video, picture


@pytest.mark.parametrize(
    "name",
    [
        "12:30:00.mp4",
        "http:x.mp4",
        "concat:a|b.mp4",
        "-v.mp4",
        "100%d of a%03d.mp4",
        "a?b#c&d [e]*.mp4",
        " wörter ☃.mp4",
        os.fsdecode(b"latin-\xe9.mp4"),
    ],
)
def test_a_path_is_a_path_whatever_its_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_video(tmp_path / "made.mp4", 5, sound=SAMPLE_RATE, flashes=[0])
    try:
        shutil.copy(made, tmp_path / name)
    except OSError:
        pytest.skip("this file system refuses the name")
    monkeypatch.chdir(tmp_path)
    for path in (Path(name), tmp_path / name):
        facts = probe(path)
        assert [frame_number(to_picture(f, facts.size)) for f in read_frames(facts, facts.rate)] == [255, 1, 2, 3, 4]
        assert AudioTrack(facts).read(1000).any()


@pytest.mark.parametrize("marked", [None, 0, 1])
def test_the_default_tracks_are_taken_else_the_first(tmp_path: Path, marked: int | None) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        videos = [container.add_stream("libx264", rate=30) for _ in range(2)]
        sounds = [container.add_stream("pcm_s16le", rate=SAMPLE_RATE, layout="stereo") for _ in range(2)]
        for number, (video, sound) in enumerate(zip(videos, sounds, strict=True)):
            video.height, video.width, video.pix_fmt = *SIZE, "yuv420p"
            for stream in (video, sound):
                stream.disposition = Disposition.default if number == marked else Disposition(0)
        for number, (video, sound) in enumerate(zip(videos, sounds, strict=True)):
            for frame in range(3):
                shown = av.VideoFrame.from_ndarray(picture(100 * number + frame), format="rgb24")
                shown.pts, shown.time_base = frame, Fraction(1, 30)
                container.mux(video.encode(shown))
            container.mux(video.encode(None))
            tone = np.full((1, 2 * SAMPLE_RATE // 10), 1000 * (number + 1), np.int16)
            heard = av.AudioFrame.from_ndarray(tone, format="s16", layout="stereo")
            heard.sample_rate, heard.pts, heard.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
            container.mux(sound.encode(heard))
            container.mux(sound.encode(None))
    facts = probe(tmp_path / "a.mkv")
    number = marked or 0
    shown = [frame_number(to_picture(frame, facts.size)) for frame in read_frames(facts, facts.rate)]
    assert shown == [100 * number + frame for frame in range(3)]
    assert (AudioTrack(facts).read(1000) == 1000 * (number + 1)).all()


def test_a_track_that_no_decoder_reads_says_so(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "a.mkv", 5).read_bytes()
    (tmp_path / "b.mkv").write_bytes(whole.replace(b"V_MPEG4/ISO/AVC", b"V_UNKNOWN/CODEC"))
    with pytest.raises(UnreadableVideoError, match="no decoder"):
        probe(tmp_path / "b.mkv")


def bar(number: int) -> np.ndarray:
    """A vertical bar that goes right, uint8[96, 160, 3]."""
    rgb = np.full((96, 160, 3), 30, np.uint8)
    rgb[:, 4 + 2 * number : 28 + 2 * number] = 220
    return rgb


@pytest.mark.parametrize(("codec", "top_first"), [("libx264", True), ("mpeg2video", True), ("mpeg2video", False)])
def test_interlaced_frames_are_made_progressive_at_their_own_rate(tmp_path: Path, codec: str, top_first: bool) -> None:
    with av.open(str(tmp_path / "a.ts"), "w") as container:
        video = container.add_stream(codec, rate=30)
        video.height, video.width, video.pix_fmt, video.bit_rate = 96, 160, "yuv420p", 4_000_000
        video.options = {"x264-params": "tff=1"} if codec == "libx264" else {"flags": "+ilme+ildct"}
        for number in range(30):
            rgb = bar(2 * number)
            rgb[int(top_first) :: 2] = bar(2 * number + 1)[int(top_first) :: 2]  # the later of the two fields
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            graph = av.filter.Graph()
            mark = graph.add("setfield", "tff" if top_first else "bff")
            graph.link_nodes(graph.add_buffer(template=frame), mark, graph.add("buffersink")).configure()
            graph.push(frame)
            container.mux(video.encode(graph.pull()))
        container.mux(video.encode(None))
    facts = probe(tmp_path / "a.ts")
    frames = list(read_frames(facts, facts.rate))
    assert (facts.rate, len(frames)) == (30, 30)
    for number, frame in enumerate(frames):
        error = np.abs(to_picture(frame, facts.size).astype(int) - bar(2 * number)).mean((1, 2))
        assert error.max() < 3  # in every row; a row of the other field is 4.75 off


def test_a_change_of_size_between_interlaced_frames_is_followed(tmp_path: Path) -> None:
    parts = []
    for number, size in enumerate([(96, 128), (48, 64)]):
        part = tmp_path / f"{number}.ts"
        with av.open(str(part), "w") as container:
            video = container.add_stream("libx264", rate=30)
            video.height, video.width, video.pix_fmt = *size, "yuv420p"
            video.options = {"x264-params": "tff=1", "crf": "10"}
            for frame in range(10):
                shown = av.VideoFrame.from_ndarray(picture(10 * number + frame, size), format="rgb24")
                shown.pts, shown.time_base = frame, Fraction(1, 30)
                container.mux(video.encode(shown))
            container.mux(video.encode(None))
        parts.append(part.read_bytes())
    (tmp_path / "a.ts").write_bytes(b"".join(parts))
    facts = probe(tmp_path / "a.ts")
    assert [frame_number(to_picture(f, SIZE)) for f in read_frames(facts, facts.rate)] == list(range(20))
