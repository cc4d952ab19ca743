"""The game: continuous, in step with its controls and its sound, equal for equal seeds."""

import ctypes
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from owl.data import game
from owl.data.flow import estimate_flow
from owl.data.modalities.audio import Audio
from owl.data.modalities.depth import Depth
from tests.helpers.errors import refused


def can_sound() -> bool:
    """Whether libopenal1 is installed; tests check the sound if so, and the error if not."""
    try:
        ctypes.CDLL("libopenal.so.1")
    except OSError:
        return False
    return True


BUFFERS: tuple[game.Buffer, ...] = ("depth", "audio") if can_sound() else ("depth",)


@pytest.fixture(scope="module")
def episode() -> list[game.Frame]:
    return list(game.play("deathmatch", 350, seed=1, buffers=BUFFERS))


def test_frames_have_the_documented_types(episode: list[game.Frame]) -> None:
    assert len(episode) == 350
    for frame in episode[::50]:
        assert (frame.rgb.shape, frame.rgb.dtype) == ((96, 160, 3), np.uint8)
        depth = Depth.record(frame, frame)
        assert (depth.shape, depth.dtype) == ((96, 160), np.uint8)
        assert (frame.buttons.shape, frame.axes.shape) == ((len(game.BUTTONS),), (len(game.AXES),))
    assert [number for number, frame in enumerate(episode) if frame.cut] == [0]
    assert not episode[0].buttons.any()
    assert not episode[0].axes.any()


def test_controls_belong_to_the_tic_that_brought_their_frame_about(episode: list[game.Frame]) -> None:
    turned = np.array([frame.axes[0] for frame in episode])
    moved = [0.0]
    for before, frame in itertools.pairwise(episode):
        moved.append(float(np.median(estimate_flow(before.rgb, frame.rgb, 2)[..., 0])))
    # changes, for a turn that is held correlates with its neighbours: to the right, what is seen came from the right
    change, motion = np.diff(turned)[2:-2], np.diff(moved)
    correlation = {lag: np.corrcoef(change, motion[2 + lag : len(motion) - 2 + lag])[0, 1] for lag in (-1, 0, 1)}
    assert correlation[0] > 0.6
    assert abs(correlation[-1]) < 0.3
    assert abs(correlation[1]) < 0.3


def test_the_player_walks_about_and_turns_either_way() -> None:
    for seed in (1, 2, 3):
        frames = list(game.play("deathmatch", 350, size=(48, 80), seed=seed))
        walking = np.mean([frame.buttons[game.BUTTONS.index("MOVE_FORWARD")] for frame in frames])
        turns = np.array([frame.axes[0] for frame in frames])
        assert walking > 0.45
        assert 0.3 < np.mean(turns != 0) < 0.9
        assert turns.min() < -2
        assert turns.max() > 2
        changes = [np.abs(a.rgb.astype(int) - b.rgb).mean() for a, b in itertools.pairwise(frames)]
        assert np.mean(np.array(changes) < 0.5) < 0.15  # hardly a frame repeats the one before


def test_equal_seeds_play_equal_episodes(episode: list[game.Frame]) -> None:
    again = list(game.play("deathmatch", 60, seed=1, buffers=BUFFERS))
    for first, second in zip(episode, again, strict=False):
        np.testing.assert_array_equal(first.rgb, second.rgb)
        np.testing.assert_array_equal(first.state.depth_buffer, second.state.depth_buffer)
        np.testing.assert_array_equal(first.state.audio_buffer, second.state.audio_buffer)
        np.testing.assert_array_equal([*first.buttons, *first.axes], [*second.buttons, *second.axes])
    other = list(game.play("deathmatch", 5, seed=2))
    assert (other[4].rgb != episode[4].rgb).mean() > 0.2


def test_sound_is_exactly_in_step_or_its_absence_is_explained(episode: list[game.Frame]) -> None:
    if not can_sound():
        with refused("game.sound", "`apt-get install libopenal1`"):
            game.check_audio()
        return
    sounds = [Audio.record(frame, frame) for frame in episode]
    assert {(sound.shape, sound.dtype) for sound in sounds} == {((1260, 2), np.dtype(np.int16))}
    audio = np.concatenate(sounds).astype(int)
    assert np.abs(audio).max() > 1000
    jumps = np.abs(np.diff(audio, axis=0)).max(axis=1)
    seams = np.arange(len(sounds) - 1) * 1260 + 1259
    # one sample lost or doubled at each frame would make the seams rougher than the rest
    assert jumps[seams].mean() < 2 * jumps[np.abs(audio[1:]).max(axis=1) > 0].mean()


def test_without_openal_recording_with_sound_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "libopenal.so.1").touch()  # found first by the loader, and no library
    finished = subprocess.run(
        [sys.executable, "-m", "owl", "data", "record", str(tmp_path / "dataset"), "--frames", "30", "--audio"],
        env={"LD_LIBRARY_PATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 2
    assert "apt-get install libopenal1" in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("size", [(48, 80), (97, 161), (360, 640)])
def test_any_size_shows_the_same_scene(size: tuple[int, int]) -> None:
    small, frame = (next(game.play("deathmatch", 1, size=s, seed=4, buffers=["depth"])) for s in ((96, 160), size))
    assert frame.rgb.shape == (*size, 3)
    assert Depth.record(frame, frame).shape == size
    shown = cv2.resize(frame.rgb, (160, 96), interpolation=cv2.INTER_AREA).astype(int)
    difference = np.abs(shown - small.rgb).mean()
    # not the same screen, so not the same field of view to the pixel; another scene would differ by 30 or more
    assert difference < 20


def test_other_scenarios_can_be_played() -> None:
    for scenario in ("my_way_home", "basic", "health_gathering"):
        frames = list(game.play(scenario, 20, size=(48, 80)))
        assert len(frames) == 20
        assert (frames[0].rgb != frames[-1].rgb).any()


def test_a_scenario_file_of_your_own(tmp_path: Path) -> None:
    config = tmp_path / "mine.cfg"
    config.write_text("doom_scenario_path = mine.wad\ndoom_map = map01\n")  # beside the .cfg
    with refused("game.start", "mine.cfg", "mine.wad"):
        next(game.play(str(config), 1, size=(48, 80)))
    shutil.copy(game.find_scenario("basic")[0].with_suffix(".wad"), tmp_path / "mine.wad")
    assert next(game.play(str(config), 1, size=(48, 80))).rgb.shape == (48, 80, 3)


def test_a_map_of_a_scenario_can_be_chosen() -> None:
    first, same, other = (
        next(game.play(scenario, 1, size=(48, 80))).rgb.astype(int)
        for scenario in ("freedoom2", "freedoom2:map01", "freedoom2:MAP07")
    )
    np.testing.assert_array_equal(same, first)
    assert np.abs(other - first).mean() > 10
    for missing in ("freedoom2:MAP99", "deathmatch:MAP02"):
        with refused("game.map", *missing.split(":"), "MAP01"):
            game.find_scenario(missing)


@pytest.mark.parametrize("scenario", ["cig", "multi_duel"])
def test_a_scenario_without_a_start_for_one_player_is_refused(scenario: str) -> None:
    with refused("game.scenario", f"'{scenario}'"):  # the game would crash
        next(game.play(scenario, 1, size=(48, 80)))


def test_wrong_names_and_sizes_are_explained(tmp_path: Path) -> None:
    with refused("game.scenario", "'deathmach'", "did you mean 'deathmatch'?", "basic, ", "take_cover"):
        game.find_scenario("deathmach")
    with refused("game.scenario", str(tmp_path / "none.cfg"), ".cfg or"):
        game.find_scenario(str(tmp_path / "none.cfg"))
    with refused("game.scenario", "'doom2'"):  # it needs a game that ViZDoom does not bring along
        game.find_scenario("doom2")
    with refused("game.size", "2000x4000", "1080x1920"):
        game.check_size((2000, 4000))
