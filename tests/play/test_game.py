"""The real game as a world: it follows the controls, returns to any moment, and equal actions give equal pictures."""

import numpy as np
import pytest

from owl.data import game
from owl.play.game import GameWorld
from owl.play.world import Settings
from tests.helpers.errors import refused

FORWARD = np.array([name == "MOVE_FORWARD" for name in game.BUTTONS])
IDLE = np.zeros(len(game.BUTTONS), bool)


def turn(degrees: float) -> np.ndarray:
    return np.array([degrees], np.float32)


def test_it_comes_back_to_any_moment() -> None:
    world = GameWorld("deathmatch", (48, 64), sound=False)
    try:
        begin = world.reset(0, 3).rgb
        for _ in range(5):
            world.step(FORWARD, turn(2.5))
        moment = world.snapshot()
        first = [world.step(FORWARD, turn(-3)).rgb for _ in range(5)]
        other = [world.step(IDLE, turn(5)).rgb for _ in range(2)]
        world.restore(moment)
        again = [world.step(FORWARD, turn(-3)).rgb for _ in range(5)]
        assert np.array_equal(first, again)
        assert not np.array_equal(first[1], other[1])
        assert np.array_equal(world.reset(0, 3).rgb, begin)
        assert not np.array_equal(world.reset(0, 4).rgb, begin)
    finally:
        world.close()
    world.close()  # twice does no harm


def test_it_is_heard_and_a_shot_is_loud() -> None:
    world = GameWorld("deathmatch", (48, 64), sound=True)
    attack = np.array([name == "ATTACK" for name in game.BUTTONS])
    played = {}
    try:
        for name, buttons in (("idle", IDLE), ("shot", attack), ("again", attack)):
            assert world.reset(0, 3).sound is None
            pictures = [world.step(buttons, turn(0)) for _ in range(20)]
            assert {picture.sound.shape for picture in pictures if picture.sound is not None} == {(2, 1260)}
            played[name] = np.concatenate([picture.sound for picture in pictures if picture.sound is not None], 1)
    finally:
        world.close()
    assert played["idle"].dtype == np.float32
    assert 0.05 < np.abs(played["shot"]).max() <= 1
    assert np.square(played["shot"]).mean() > 2 * np.square(played["idle"]).mean()
    assert np.array_equal(played["shot"], played["again"])


def test_what_it_cannot_do_is_reported() -> None:
    with refused("game.scenario", "deathmach", "deathmatch"):
        GameWorld("deathmach", (48, 64), sound=False)
    world = GameWorld("deathmatch", (48, 64), sound=False)
    with refused("play.start", "no start 1", "0 to 0"):
        world.reset(1, 0)
    with pytest.raises(Exception, match="game got settings"):
        world.change(Settings(steps=3))
    world.change(Settings())
    with refused("play.picture", "game"):
        world.add_start(np.zeros((48, 64, 3), np.uint8))
