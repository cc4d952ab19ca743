"""The sound of a learned world: it is decoded with the pictures, comes back with a moment, and is replayed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from owl.pixels import to_float, to_uint8
from owl.play.learned import LearnedWorld, Sources
from owl.play.log import Action, ActionLog, digest
from owl.play.replay import make_world, replay
from owl.play.world import SoundFormat
from tests.helpers.errors import refused
from tests.helpers.exports import LATENTS, SAMPLES, SOUNDS, STRIDE, WORLD
from tests.helpers.shards import AXES, BUTTONS

IDLE, STILL = np.zeros(len(BUTTONS), bool), np.zeros(len(AXES), np.float32)
SOURCES = Sources(WORLD, data=LATENTS, context=4, stride=STRIDE)


@pytest.fixture
def world(exports: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LearnedWorld]:
    """That world."""
    monkeypatch.chdir(exports)
    made = LearnedWorld(SOURCES, steps=1)
    yield made
    made.close()


def heard(world: LearnedWorld, frames: int) -> np.ndarray:
    """float32[2, samples] of the next frames."""
    sounds = [world.step(IDLE, STILL).sound for _ in range(frames)]
    return np.concatenate([sound for sound in sounds if sound is not None], 1)


def test_every_frame_has_as_much_sound_as_it_lasts(world: LearnedWorld) -> None:
    assert world.description.sound == SoundFormat(44_100, 2)
    assert world.reset(0, 0).sound is None
    sound = heard(world, 3)
    assert (sound.shape, sound.dtype) == ((2, 3 * SAMPLES), np.float32)
    assert world.description.fps == 44_100 / SAMPLES
    assert 0 < np.abs(sound).max() <= 1
    world.reset(0, 1)
    assert not np.array_equal(heard(world, 3), sound)


def test_sound_comes_back_with_a_moment(world: LearnedWorld) -> None:
    world.reset(0, 0)
    heard(world, 2)
    moment = world.snapshot()
    expected = heard(world, 3)
    world.restore(moment)
    assert np.array_equal(heard(world, 3), expected)


def test_a_replay_has_the_same_sound(world: LearnedWorld) -> None:
    world.reset(1, 5)
    actions = [Action(IDLE, STILL, world.settings, digest(world.step(IDLE, STILL))) for _ in range(3)]
    log = ActionLog(world.description.origin, BUTTONS, AXES, 1, 5, actions)
    again = make_world(log)
    assert again.description.sound is not None
    assert all(frame.same for frame in replay(log, again))
    moved = make_world(log, audio_decoder=SOUNDS)
    assert moved.description.origin["audio_decoder"] == str(Path(SOUNDS).resolve())
    assert all(frame.same for frame in replay(log, moved))


def test_a_picture_of_the_player_is_where_the_world_starts(world: LearnedWorld) -> None:
    starts = len(world.description.starts)
    given = world.description.starts[0][:, ::-1].copy()
    world.add_start(given)
    assert len(world.description.starts) == starts + 1
    begin = world.reset(starts, 0)
    (decoder,) = world.decoders.values()
    video = torch.from_numpy(given).movedim(-1, 0)[None]
    with torch.no_grad():
        expected = to_uint8(decoder.decode(decoder.encode(to_float(video)).mean))[0].movedim(0, -1).numpy()
    assert np.array_equal(begin.rgb, expected)
    picture = world.step(IDLE, STILL)
    assert picture.sound is not None
    assert np.isfinite(picture.sound).all()
    world.reset(0, 0)
    assert digest(world.step(IDLE, STILL)) != digest(picture)
    world.decoders = {"other": torch.nn.Identity()}
    with refused("play.picture", "other cannot encode"):
        world.add_start(given)


def test_without_sound_there_is_the_same_picture(world: LearnedWorld, exports: Path) -> None:
    silent = LearnedWorld(Sources(**vars(SOURCES) | {"sound": False}), steps=1)
    assert silent.description.sound is None
    for played in (world, silent):
        played.reset(0, 0)
    found, expected = silent.step(IDLE, STILL), world.step(IDLE, STILL)
    assert found.sound is None
    assert np.array_equal(found.rgb, expected.rgb)
    (exports / SOUNDS).rename(exports / "moved")
    try:
        with refused("decoder.missing", SOUNDS, "--audio_decoder"):
            LearnedWorld(SOURCES)
        given = LearnedWorld(Sources(**vars(SOURCES) | {"audio_decoder": "moved"}))
        assert given.description.sound == SoundFormat(44_100, 2)
    finally:
        (exports / "moved").rename(exports / SOUNDS)
