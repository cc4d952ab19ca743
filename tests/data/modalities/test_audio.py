"""Sound of a dataset is what was recorded: its level is kept, and what was clipped or silent is counted."""

import wave
from pathlib import Path

import numpy as np
import pytest

from owl.commands.data_inspect import main as inspect
from owl.commands.data_verify import main as verify
from owl.data.modalities.audio import AudioLevels
from owl.data.overview import DatasetReader, measure_audio
from owl.data.windows import WindowDataset
from tests.helpers.errors import refused
from tests.helpers.tiny import owl_here
from tests.helpers.videos import make_video


def levels(*frames: np.ndarray) -> AudioLevels:
    found = AudioLevels()
    for frame in frames:
        found.add(frame)
    return found


def test_levels_are_in_decibels_of_full_scale() -> None:
    sine = np.rint(2**14 * np.sin(2 * np.pi * np.arange(4410) / 441)).astype(np.int16)[:, None]
    found = levels(sine, sine)
    assert (found.frames, found.silent, found.samples, found.clipped) == (2, 0, 8820, 0)
    assert found.peak == pytest.approx(0.5, abs=1e-4)
    assert str(found) == "peak -6.0 dBFS, RMS -9.0 dBFS, no clipping, 0 of 2 frames silent"


def test_both_ends_of_the_scale_are_clipped_and_their_neighbours_are_not() -> None:
    found = levels(np.array([[32767, -32768], [-32767, 32766], [0, -32766]], np.int16), np.zeros((2, 2), np.int16))
    assert (found.clipped, found.clipped_frames, found.silent) == (3, 1, 1)
    assert "3 samples clipped in 1 frames, 1 of 2 frames silent" in str(found)


def test_silence_and_frames_without_samples_are_silent() -> None:
    assert str(levels(np.zeros((3, 2), np.int16), np.zeros((0, 2), np.int16))) == "all of 2 frames are silent"


@pytest.mark.parametrize("gain", [1.0, 8.0])
def test_clipped_sound_is_kept_as_it_is_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, gain: float
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    make_video(tmp_path / "v.mov", 30, sound=44_100, sound_codec="pcm_s16le", layout="mono", flashes=[3], gain=gain)
    assert owl_here("data", "import", "v.mov", "data", cwd=tmp_path) == 0
    reader, time = DatasetReader(str(tmp_path / "data")), np.arange(1470) / 44_100
    beep = np.clip(gain * 0.5 * 2**15 * np.sin(2 * np.pi * 1000 * (time + 0.1)), -(2**15), 2**15 - 1)
    for channel in reader.frame("audio", 0, 4).T:  # type: ignore[union-attr]
        assert np.abs(channel - beep).max() <= 1  # neither quieter nor louder
    clipped = int((np.abs(beep) >= 32767).sum())
    found = measure_audio(reader)
    assert found.clipped == pytest.approx(2 * clipped, abs=0 if gain == 1 else 20)
    assert (found.clipped_frames, found.frames, found.silent) == (int(gain > 1), 30, 29)
    assert verify(str(tmp_path / "data")) == 0
    assert f"sound: {found}" in capsys.readouterr().out
    inspect(str(tmp_path / "data"), out=str(tmp_path / "sheet.png"))
    assert str(found) in capsys.readouterr().out


def test_a_silent_track_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_video(tmp_path / "v.mp4", 30, sound=8_000, layout="mono")
    assert owl_here("data", "import", "v.mp4", "data", cwd=tmp_path) == 0
    assert verify(str(tmp_path / "data")) == 0
    assert "sound: all of 30 frames are silent" in capsys.readouterr().out
    window = WindowDataset(tmp_path / "data", "train", ["audio"], length=4)[0]
    assert not window["audio"].any()


def test_a_dataset_without_sound_names_what_it_holds(tmp_path: Path) -> None:
    make_video(tmp_path / "v.mp4", 6)
    assert owl_here("data", "import", "v.mp4", "data", cwd=tmp_path) == 0
    with refused("windows.modalities", str(tmp_path / "data"), "'audio'", "it holds rgb"):
        WindowDataset(tmp_path / "data", "train", ["audio"], length=2)


def test_a_wav_file_alone_is_no_footage(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8_000, 0, "NONE", ""))
        file.writeframes(bytes(16_000))
    with refused("footage.unusable", "a.wav", "no video track"):
        owl_here("data", "import", "a.wav", "data", cwd=tmp_path)
