"""Videos as read: the right picture at the right time, upright and unsqueezed, with the sound that belongs to it."""

import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from owl.data.video import (
    AUDIO_JITTER,
    SAMPLE_RATE,
    AudioTrack,
    UnreadableVideoError,
    VideoFacts,
    first_sample,
    probe,
    read_frames,
    to_picture,
)
from tests.helpers.videos import RATE, SIZE, frame_number, make_video, picture


def numbers(facts: VideoFacts, fps: Fraction | int) -> list[int]:
    """The number that each frame of the grid shows."""
    return [frame_number(to_picture(frame, facts.size)) for frame in read_frames(facts, Fraction(fps))]


@pytest.mark.parametrize(
    ("name", "codec", "sound_codec", "sound", "rate"),
    [
        ("a.mp4", "libx264", "aac", 48_000, RATE),
        ("a.mkv", "libx264", "aac", 44_100, Fraction(30_000, 1001)),  # Matroska rounds times to milliseconds
        ("a.webm", "libvpx-vp9", "libopus", 48_000, 24),
        ("a.ts", "libx264", "aac", 22_050, 25),  # transport streams do not start at time zero
        ("a.mov", "mpeg4", "pcm_s16le", 8_000, 50),
    ],
)
def test_flash_and_beep_fall_on_the_same_frame(
    tmp_path: Path, name: str, codec: str, sound_codec: str, sound: int, rate: Fraction | int
) -> None:
    path = make_video(
        tmp_path / name, 40, rate=rate, codec=codec, sound=sound, sound_codec=sound_codec, flashes=[7, 39]
    )
    facts = probe(path)
    fps = facts.rate
    assert fps == rate
    expected = [255 if frame in (7, 39) else frame for frame in range(40)]
    assert numbers(facts, fps) == expected
    track = AudioTrack(facts)
    loud = []
    for frame in range(40):
        samples = track.read(first_sample(frame + 1, fps) - first_sample(frame, fps))
        loud.append(float(np.abs(samples[:, 0] / 2**15).mean()))
    # a sine of amplitude 1/2 has mean 1/pi; its neighbours hear the codec's smear at most
    assert [round(loud[frame] * np.pi) for frame in (7, 39)] == [1, 1]
    assert max(volume for frame, volume in enumerate(loud) if frame not in (7, 39)) < 0.05


def test_sound_is_placed_to_the_millisecond_and_keeps_left_from_right(tmp_path: Path) -> None:
    facts = probe(make_video(tmp_path / "a.mp4", 60, sound=48_000, flashes=[30]))
    sound = AudioTrack(facts).read(2 * SAMPLE_RATE).astype(int)
    on = np.flatnonzero(np.abs(sound[:, 0]) > 4000)
    assert abs(on[0] / SAMPLE_RATE - 1) < 1e-3
    assert abs(on[-1] / SAMPLE_RATE - 31 / 30) < 1e-3
    assert np.abs(sound).max(0) == pytest.approx([2**14, 2**13], rel=0.05)


@pytest.mark.parametrize("sound", [8_000, 44_100, 48_000])
@pytest.mark.parametrize(("layout", "left", "right"), [("mono", 1, 1), ("stereo", 1, 0.5), ("5.1", 1.707, 1.207)])
def test_the_level_is_kept(tmp_path: Path, sound: int, layout: str, left: float, right: float) -> None:
    """Of five channels, the front ones, and the centre and those behind 3 dB quieter (ITU-R BS.775)."""
    path = tmp_path / "a.mkv"
    facts = probe(make_video(path, 30, sound=sound, layout=layout, sound_codec="pcm_s16le", flashes=[10], gain=0.5))
    heard = AudioTrack(facts).read(SAMPLE_RATE).astype(int)[SAMPLE_RATE // 3 + 441 : SAMPLE_RATE // 3 + 882]
    assert np.abs(heard).max(0) / 2**13 == pytest.approx([left, right], rel=0.02)


def test_a_late_track_starts_with_silence_and_a_short_one_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream("libx264", rate=RATE), container.add_stream("pcm_s16le", rate=SAMPLE_RATE)
        video.height, video.width, video.pix_fmt = *SIZE, "yuv420p"
        audio.layout = "stereo"
        tone = np.full((1, 2 * SAMPLE_RATE // 2), 8000, np.int16)  # half a second, from 0.5 s on
        frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, SAMPLE_RATE // 2, Fraction(1, SAMPLE_RATE)
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
        for number in range(60):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        container.mux(video.encode(None))
    sound = AudioTrack(probe(path)).read(2 * SAMPLE_RATE)
    on = np.flatnonzero(sound[:, 0])
    assert abs(on[0] - SAMPLE_RATE // 2) < 50
    assert abs(len(on) - SAMPLE_RATE // 2) < 50
    assert sound.shape == (2 * SAMPLE_RATE, 2)


def test_samples_of_neighbouring_frames_add_up_for_every_window(tmp_path: Path) -> None:
    for fps in (Fraction(24), Fraction(30_000, 1001), Fraction(35), Fraction(25, 2)):
        starts = [first_sample(frame, fps) for frame in range(200)]
        for span in (1, 2, 7):
            lengths = [b - a for a, b in zip(starts, starts[span:], strict=False)]
            assert min(lengths) >= int(span * SAMPLE_RATE / fps)


def test_half_the_rate_takes_every_other_frame_and_double_the_rate_shows_each_twice(tmp_path: Path) -> None:
    facts = probe(make_video(tmp_path / "a.mp4", 40))
    assert numbers(facts, 15) == list(range(0, 40, 2))
    assert numbers(facts, 60) == [frame // 2 for frame in range(80)]


def test_a_varying_rate_is_laid_on_a_constant_one(tmp_path: Path) -> None:
    fast, slow = [Fraction(frame, 60) for frame in range(30)], [Fraction(1, 2) + Fraction(k, 10) for k in range(5)]
    facts = probe(make_video(tmp_path / "a.mp4", 35, rate=60, times=fast + slow))
    shown = numbers(facts, 60)
    assert shown[:30] == list(range(30))
    assert shown[30:54] == [30 + k // 6 for k in range(24)]
    assert set(shown) == set(range(35))
    assert 40 <= len(numbers(facts, 50)) <= 50


def test_one_frame_is_enough(tmp_path: Path) -> None:
    facts = probe(make_video(tmp_path / "a.mp4", 1))
    assert numbers(facts, facts.rate) == [0]
    assert numbers(facts, 5) == [0]


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_pictures_come_upright(tmp_path: Path, rotation: int) -> None:
    facts = probe(make_video(tmp_path / "a.mp4", 201, rotation=rotation))
    assert facts.size == (SIZE if rotation == 180 else SIZE[::-1])
    frames = list(read_frames(facts, facts.rate))
    expected = np.rot90(picture(200), rotation // 90)
    error = np.abs(to_picture(frames[-1], facts.size).astype(int) - expected)
    assert np.median(error) < 10


@pytest.mark.parametrize(
    ("matrix", "quarters"),  # (a, b, c, d): x' = a x + c y, y' = b x + d y; quarters from left to right, top first
    [
        ((1, 0, 0, 1), "RG BY"),
        ((-1, 0, 0, 1), "GR YB"),
        ((1, 0, 0, -1), "BY RG"),
        ((-1, 0, 0, -1), "YB GR"),
        ((0, 1, 1, 0), "RB GY"),
        ((0, 1, -1, 0), "BR YG"),
        ((0, -1, 1, 0), "GY RB"),
        ((0, -1, -1, 0), "YG BR"),
    ],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_the_whole_display_matrix_is_applied(
    tmp_path: Path, name: str, matrix: tuple[int, int, int, int], quarters: str
) -> None:
    colours = {"R": (200, 30, 30), "G": (30, 200, 30), "B": (30, 30, 200), "Y": (200, 200, 30)}

    def draw(number: int, size: tuple[int, int], flash: bool) -> np.ndarray:
        rgb = np.zeros((*size, 3), np.uint8)
        for place, letter in enumerate("RGBY"):
            down, right = divmod(place, 2)
            rows, columns = size[0] // 2, size[1] // 2
            rgb[down * rows : (down + 1) * rows, right * columns : (right + 1) * columns] = colours[letter]
        return rgb

    a, b, c, d = (n * 2**16 for n in matrix)
    facts = probe(make_video(tmp_path / name, 2, matrix=[a, b, 0, c, d, 0, 0, 0, 2**30], draw=draw))
    assert facts.size == (SIZE if matrix[0] else SIZE[::-1])
    rgb = to_picture(next(read_frames(facts, facts.rate)), facts.size)
    height, width = facts.size
    seen = [rgb[y, x].astype(int) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    nearest = [min(colours, key=lambda name: int(np.abs(pixel - colours[name]).sum())) for pixel in seen]
    assert "".join(nearest) == quarters.replace(" ", "")


@pytest.mark.parametrize("turned", [False, True])
def test_wide_pixels_are_made_square_after_turning(tmp_path: Path, turned: bool) -> None:
    matrix = [0, 2**16, 0, -(2**16), 0, 0, 0, 0, 2**30] if turned else None

    def draw(number: int, size: tuple[int, int], flash: bool) -> np.ndarray:
        rgb = picture(0b10000001, size)  # marks at both sides, and one at the top
        rgb[:8] = 120
        return rgb

    facts = probe(make_video(tmp_path / "a.mp4", 2, matrix=matrix, aspect=Fraction(2), draw=draw))
    wide = (SIZE[0], 2 * SIZE[1])
    assert facts.size == (wide[::-1] if turned else wide)
    rgb = to_picture(next(read_frames(facts, facts.rate)), facts.size, facts.pixel_aspect)
    upright = np.rot90(rgb) if turned else rgb
    assert upright.shape == (*wide, 3)
    assert frame_number(upright[8:]) == 0b10000001
    assert np.abs(upright[1:7].astype(int) - 120).max() < 20


@pytest.mark.parametrize("first", [(44_100, "stereo"), (48_000, "5.1")])
@pytest.mark.parametrize(
    "second", [(44_100, "5.1"), (44_100, "mono"), (32_000, "stereo"), (48_000, "stereo"), (22_050, "mono")]
)
def test_sound_that_changes_its_format_midway_is_heard_to_the_end(
    tmp_path: Path, first: tuple[int, str], second: tuple[int, str]
) -> None:
    parts = []
    for number, (sound, layout) in enumerate((first, second, first)):
        part = make_video(tmp_path / f"{number}.ts", 60, sound=sound, layout=layout, flashes=[10, 50])
        parts.append(part.read_bytes())
    (tmp_path / "a.ts").write_bytes(b"".join(parts))
    sound = AudioTrack(probe(tmp_path / "a.ts")).read(6 * SAMPLE_RATE).astype(int)
    heard = np.flatnonzero(np.abs(sound[:, 0]) > 1500)
    begins = heard[np.flatnonzero(np.diff(heard, prepend=-SAMPLE_RATE) > SAMPLE_RATE // 10)] / SAMPLE_RATE
    assert begins == pytest.approx([frame / 30 for frame in (10, 50, 70, 110, 130, 170)], abs=AUDIO_JITTER)


def test_other_shapes_are_cut_about_the_centre_not_squeezed(tmp_path: Path) -> None:
    facts = probe(make_video(tmp_path / "a.mp4", 1, size=(64, 128)))
    frame = next(read_frames(facts, facts.rate))
    whole, middle = to_picture(frame, (64, 128)), to_picture(frame, (32, 32))
    np.testing.assert_allclose(middle, whole[::2, 32:96:2], atol=3)
    # an anamorphic video: its pixels are twice as wide as high, so all of its width is needed for half its height
    wide = to_picture(frame, (32, 128), Fraction(2))
    np.testing.assert_allclose(wide, whole[16:48], atol=3)


def test_what_is_no_video_says_why(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "poem.txt").write_text("Tyger Tyger, burning bright,\n" * 50)
    make_video(tmp_path / "whole.mp4", 40)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:-500])  # loses its table of contents
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((2, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes(bytes(4000))
    for name, reason in {
        "empty.mp4": "is empty",
        "noise.mp4": "cannot be read as a video",
        "poem.txt": "not a video",
        "cut.mp4": "cannot be read as a video",
        "sound.wav": "no video track",
    }.items():
        with pytest.raises(UnreadableVideoError, match=reason):
            probe(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mkv", "libx264"), ("a.mp4", "libx264"), ("a.mp4", "mpeg4"), ("a.ts", "libx264")]
)
def test_a_video_that_breaks_off_keeps_what_is_whole(tmp_path: Path, name: str, codec: str) -> None:
    noise = np.random.default_rng(0).integers(0, 100, (60, *SIZE, 3), np.uint8)  # so that each packet is long

    def draw(number: int, size: tuple[int, int], flash: bool) -> np.ndarray:
        return picture(number, size) // 2 + noise[number]

    # with its table of contents in front an .mp4 can be cut, and promises all 60 frames nevertheless
    movflags = "faststart" if name == "a.mp4" else ""
    whole = make_video(tmp_path / f"whole-{name}", 60, codec=codec, movflags=movflags, draw=draw).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    facts = probe(tmp_path / name)
    frames = [to_picture(frame, SIZE).astype(int) for frame in read_frames(facts, facts.rate)]
    assert 25 < len(frames) < 35
    for number, frame in enumerate(frames):  # the last one is as good as the others, in every row
        assert np.abs(frame - draw(number, SIZE, False)).mean((1, 2)).max() < 25


def test_a_damaged_container_keeps_what_comes_before_the_damage(tmp_path: Path) -> None:
    whole = bytearray(make_video(tmp_path / "whole.mkv", 60).read_bytes())
    at = len(whole) // 2
    whole[at : at + 40] = np.random.default_rng(0).bytes(40)
    (tmp_path / "hit.mkv").write_bytes(whole)
    facts = probe(tmp_path / "hit.mkv")
    shown = numbers(facts, facts.rate)
    assert len(shown) >= facts.frames(facts.rate) - 1 > 10  # the packet that was hit may not decode
    assert shown == list(range(len(shown)))


def test_damage_in_the_middle_costs_the_damaged_frames_only(tmp_path: Path) -> None:
    whole = bytearray(make_video(tmp_path / "whole.mp4", 60, codec="mpeg4").read_bytes())
    at = whole.index(b"mdat") + len(whole) // 3
    whole[at : at + 40] = np.random.default_rng(0).bytes(40)
    (tmp_path / "hit.mp4").write_bytes(whole)
    facts = probe(tmp_path / "hit.mp4")
    shown = numbers(facts, facts.rate)
    assert len(shown) == 60
    wrong = [frame for frame, number in enumerate(shown) if number != frame]
    assert 0 < len(wrong) <= 12  # up to the next key frame
