"""Worlds side by side: every one does what it would do alone with the same inputs."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from owl import models
from owl.play.beside import SideBySide
from owl.play.learned import LearnedWorld, Sources
from owl.play.log import Action, ActionLog, digest
from owl.play.recording import captioned_row
from owl.play.replay import make_world, replay
from owl.play.world import Settings, World
from owl.viz.film import CAPTION, GAP, apart, beside, enlarged
from tests.helpers.errors import refused
from tests.helpers.exports import LATENTS, STRIDE, WORLD, make_network
from tests.helpers.play import Strip
from tests.helpers.shards import AXES, BUTTONS

ATTACK = np.arange(len(BUTTONS)) == 0


def strip(name: str, **changes: Any) -> Strip:
    """A world with another description."""
    made = Strip(sound=name == "left")
    made.description = replace(made.description, name=name, origin={"checkpoint": f"{name}.ckpt"}, **changes)
    return made


def halves(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of two worlds."""
    width = (rgb.shape[1] - GAP) // 2
    left, right = apart(rgb, 2)
    assert np.array_equal(left, rgb[:, :width])
    assert np.array_equal(right, rgb[:, -width:])
    return left, right


def test_both_get_the_same_inputs_and_come_back() -> None:
    left, right = strip("left"), strip("right")
    world = SideBySide([left, right])
    description = world.description
    assert (description.names, description.name) == (["left", "right"], "left · right")
    assert description.sound is not None
    begin = world.reset(1, 3)
    assert begin.rgb.shape[:2] == description.size
    world.change(Settings(steps=9, decoder="only"))
    moment = world.snapshot()
    alone = strip("left")
    alone.reset(1, 3)
    alone.change(world.settings)
    buttons, moved = np.array([True, False]), np.array([5.0], np.float32)
    expected, found = alone.step(buttons, moved), world.step(buttons, moved)
    for half in halves(found.rgb):
        assert np.array_equal(half, expected.rgb)
    assert np.array_equal(found.sound, expected.sound)  # of the first
    assert found.seconds["denoise"] == pytest.approx(2 * expected.seconds["denoise"])
    world.change(Settings(steps=2, decoder="only"))
    world.restore(moment)
    assert world.settings.steps == right.settings.steps == 9
    assert digest(world.step(buttons, moved)) == digest(found)
    assert world.snapshot_bytes() == 2 * left.snapshot_bytes()
    with refused("play.start", "no start 2"):
        world.reset(2, 0)
    world.close()
    assert left.closed
    assert right.closed


def test_all_start_with_the_settings_of_the_first() -> None:
    left, right = strip("left", decoders=["own", "only"]), strip("right")
    left.settings, right.settings = Settings(steps=2, decoder="own"), Settings(steps=9, decoder="only")
    world = SideBySide([left, right])
    assert left.settings == right.settings == world.settings == Settings(steps=2, decoder="only")


def test_each_keeps_its_own_decoder_where_they_share_none() -> None:
    left, right = strip("left"), strip("right", decoders=["other"])
    right.settings = Settings(decoder="other")
    world = SideBySide([left, right])
    world.reset(0, 0)
    world.change(replace(world.settings, steps=2))
    assert (left.settings.decoder, right.settings.decoder) == ("only", "other")
    assert left.settings.steps == right.settings.steps == 2
    with refused("play.decoder", "other", "none"):
        world.change(replace(world.settings, decoder="other"))
    assert SideBySide([left, strip("left")]).description.names == ["left.ckpt", "left.ckpt"]


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"buttons": ["JUMP"]}, ["buttons of right", "JUMP", "MOVE_FORWARD"]),
        ({"axes": {"mouse_y": 1.0}}, ["axes", "mouse_y"]),
        ({"fps": 30.0}, ["frames per second of right: 30.0", "500.0"]),
        ({"size": (32, 24)}, ["(32, 24)", "(16, 24)"]),
        ({"starts": []}, ["start scenes of right: 0"]),
    ],
)
def test_what_does_not_match_is_reported(changes: dict[str, Any], tokens: list[str]) -> None:
    with refused("play.side-by-side", *tokens):
        SideBySide([strip("left"), strip("right", **changes)])


def test_a_start_is_added_to_all_or_to_none(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = np.full((16, 24, 3), 99, np.uint8)
    worlds = [strip("left"), strip("middle"), strip("right")]
    world = SideBySide(worlds)
    world.add_start(given)
    assert [len(one.description.starts) for one in (world, *worlds)] == [3] * 4
    monkeypatch.setattr(worlds[2], "add_start", partial(World.add_start, worlds[2]))
    with refused("play.picture"):
        world.add_start(given)
    assert [len(one.description.starts) for one in (world, *worlds)] == [3] * 4
    world.remove_start()
    assert [len(one.description.starts) for one in (world, *worlds)] == [2] * 4

    monkeypatch.chdir(exports)
    learned = LearnedWorld(Sources(WORLD, data=LATENTS, context=4, stride=STRIDE), steps=1)
    scenes = learned.scenes
    learned.add_start(np.zeros((*learned.description.size, 3), np.uint8))
    learned.remove_start()
    assert all(torch.equal(values, scenes[name]) for name, values in learned.scenes.items())
    assert len(learned.description.starts) == len(learned.scenes["latent"])


def test_films_name_the_worlds() -> None:
    world = SideBySide([strip("left"), strip("right")])
    rgb = world.reset(0, 0).rgb
    shown = captioned_row(rgb, world.description.names)
    assert np.array_equal(shown[CAPTION:], beside([enlarged(half) for half in halves(rgb)], 2))
    left, right = halves(shown[:CAPTION])
    assert not np.array_equal(left, right)
    assert np.array_equal(captioned_row(rgb, []), enlarged(rgb))


def test_two_checkpoints_are_played_recorded_and_replayed(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exports)
    models.save(make_network(exports / LATENTS, seed=1), "other")
    axes = np.ones(len(AXES), np.float32)

    def made(path: str) -> World:
        return LearnedWorld(Sources(path, data=LATENTS, context=4, stride=STRIDE), steps=1)

    world = SideBySide([made(WORLD), made("other")])
    begin = halves(world.reset(0, 0).rgb)
    assert np.array_equal(*begin)
    picture = world.step(ATTACK, axes)
    for half, path in zip(halves(picture.rgb), (WORLD, "other"), strict=True):
        alone = made(path)
        alone.reset(0, 0)
        assert np.array_equal(half, alone.step(ATTACK, axes).rgb)
    assert not np.array_equal(*halves(picture.rgb))
    actions = [Action(ATTACK, axes, world.settings, digest(picture))]
    log = ActionLog(world.description.origin, BUTTONS, AXES, 0, 0, actions)
    assert [frame.same for frame in replay(log, make_world(log))] == [True]
    assert [frame.same for frame in replay(log, make_world(log, [WORLD, "other"]))] == [True]
    with refused("actions.origin", "1 checkpoints", "2"):
        make_world(log, [WORLD])
    with refused("actions.other-weights", models.fingerprint(models.load(WORLD))):
        make_world(log, ["other", WORLD])
