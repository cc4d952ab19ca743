"""Sound and picture of a clip are of the same instant, to the sample, after ``data import``."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from owl.data.modalities.base import Clock
from owl.data.overview import DatasetReader
from owl.data.video import SAMPLE_RATE, first_sample
from owl.data.windows import WindowDataset
from tests.helpers.tiny import owl_here
from tests.helpers.videos import click, frame_number, make_video

FRAMES, FLASHES = 54, (7, 25, 47)
NTSC = Fraction(1000, 1001)


@pytest.mark.parametrize(
    ("name", "fps", "sound", "layout", "codec"),
    [
        ("pcm.mov", Fraction(30), 44_100, "stereo", "pcm_s16le"),
        ("wav.mov", Fraction(30), 8_000, "mono", "pcm_s16le"),
        ("film.mp4", Fraction(24), 44_100, "stereo", "aac"),
        ("ntsc.mp4", 30 * NTSC, 8_000, "mono", "aac"),
        ("double.mkv", 60 * NTSC, 48_000, "stereo", "flac"),
        ("film.webm", 24 * NTSC, 48_000, "mono", "libopus"),
        ("game.ts", Fraction(35), 48_000, "stereo", "aac"),
    ],
)
def test_a_flash_and_a_click_stay_together_in_every_window(
    tmp_path: Path, name: str, fps: Fraction, sound: int, layout: str, codec: str
) -> None:
    video = make_video(
        tmp_path / "videos" / name,
        FRAMES,
        rate=fps,
        sound=sound,
        layout=layout,
        sound_codec=codec,
        codec="libvpx-vp9" if name.endswith("webm") else "libx264",
        flashes=FLASHES,
        clicks=True,
    )
    assert owl_here("data", "import", str(video), "data", cwd=tmp_path) == 0
    # the click is the source's first sample after the flash starts, in the interval that ends a frame later; the sound
    # of a window starts with the interval before its first frame
    expected = {frame: round(Fraction(click(frame, fps, sound), sound) * SAMPLE_RATE) for frame in FLASHES}
    assert all(0 <= expected[frame] - first_sample(frame, fps) <= SAMPLE_RATE / sound + 1 for frame in FLASHES)
    first, seen = 0, 0
    for split in ("train", "validation", "test"):
        for window in WindowDataset(tmp_path / "data", split, ["rgb", "audio"], length=6):  # type: ignore[attr-defined]
            pictures = [frame_number(rgb.permute(1, 2, 0).numpy()) for rgb in window["rgb"]]
            first = next(number - k for k, number in enumerate(pictures) if number != 255)
            heard = window["audio"].numpy()
            begin = first_sample(first - 1, fps)
            assert heard.shape == (2, Clock(SAMPLE_RATE, float(fps)).least(6))
            inside = [frame for frame in FLASHES if 0 <= expected[frame] - begin < heard.shape[1]]
            assert [frame for frame in FLASHES if first - 1 <= frame < first + 5] == inside
            assert [k for k, number in enumerate(pictures) if number == 255] == [
                frame - first for frame in FLASHES if first <= frame < first + 6
            ]
            for frame in inside:
                assert np.abs(heard).argmax(axis=1).tolist() == [expected[frame] - begin] * 2
                seen += 1
    assert seen >= 3 * len(FLASHES)


def test_frames_that_do_not_divide_the_sample_rate_lose_no_sample(tmp_path: Path) -> None:
    make_video(tmp_path / "v.mov", 48, rate=24, sound=44_100, sound_codec="pcm_s16le")
    assert owl_here("data", "import", "v.mov", "data", cwd=tmp_path) == 0
    reader = DatasetReader(str(tmp_path / "data"))
    lengths = [
        len(reader.frame("audio", episode, frame))  # type: ignore[arg-type]
        for episode, frames in enumerate(reader.index.episode_frames)
        for frame in range(int(frames))
    ]
    assert set(lengths) == {1837, 1838}
    assert sum(lengths[1:]) == first_sample(47, Fraction(24))


@pytest.mark.parametrize(("seconds", "begin"), [(0.5, 0), (4.0, 0), (1.0, 1)])
def test_sound_may_be_shorter_or_longer_than_the_picture_or_start_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: float, begin: int
) -> None:
    video = tmp_path / "v.mov"
    make_video(video, 60, sound=8_000, sound_codec="pcm_s16le", layout="mono", sound_seconds=seconds, sound_begin=begin)
    assert owl_here("data", "import", "v.mov", "data", cwd=tmp_path) == 0
    printed = " ".join(capsys.readouterr().err.split())
    remark = {0.5: "ends 1.5 s before the picture", 4.0: "is 2.0 s longer than", 1.0: "starts 1.0 s after"}[seconds]
    assert f"v.mov: its sound {remark}" in printed
    assert DatasetReader(str(tmp_path / "data")).index.episode_frames.sum() == 60
