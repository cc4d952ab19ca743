"""A world model is a Gymnasium environment, by Gymnasium's own check, and the page on programs that play it is true."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import Env, spaces
from gymnasium.utils.env_checker import check_env

from owl import models
from owl.data.shards import DatasetInfo
from owl.latents import load_latent_stats
from owl.play.environment import WorldEnv
from owl.play.learned import LearnedWorld, load_world
from owl.play.world import Description, Picture, World
from tests.helpers.errors import refused
from tests.helpers.latents import lively
from tests.helpers.play import Strip
from tests.helpers.shards import AXES, BUTTONS
from tests.helpers.shared import make_shared
from tests.helpers.tiny import REPOSITORY
from tests.test_docs import blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shared(tmp_path_factory.mktemp("embed") / "exports" / "doom")


@pytest.fixture
def world(folder: Path) -> Iterator[LearnedWorld]:
    made = load_world(str(folder))
    yield made
    made.close()


def test_gymnasium_accepts_it(world: LearnedWorld) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(WorldEnv(world), skip_render_check=True)  # that of rendering needs a registered name


def test_a_step_is_the_models(world: LearnedWorld) -> None:
    env: Env[Any, Any] = WorldEnv(world, reward=lambda picture: float(picture[0, 0, 0]), render_mode="rgb_array")
    picture, info = env.reset(seed=5, options={"start": 2})
    assert info["start"] == 2
    action = {"buttons": np.array([0, 1, 0], np.int8), "axes": np.array([0.5, -0.5], np.float32)}
    frames = [env.step(action) for _ in range(3)]
    assert np.array_equal(env.render(), frames[-1][0])
    assert np.array_equal(picture, world.reset(2, info["seed"]).rgb)
    for made, reward, terminated, truncated, info in frames:
        expected = world.step(np.array([False, True, False]), np.array([0.5, -0.5], np.float32)).rgb
        assert np.array_equal(made, expected)
        assert reward == expected[0, 0, 0]
        assert (terminated, truncated, info) == (False, False, {})


def test_scene_and_noise_follow_the_seed(world: LearnedWorld) -> None:
    env = WorldEnv(world)
    first = [env.reset(seed=1)[1], env.reset()[1]]
    assert first == [env.reset(seed=1)[1], env.reset()[1]]
    assert first[0] != first[1]
    assert len({env.reset()[1]["start"] for _ in range(20)}) > 1
    assert env.step({})[1] == 0.0
    assert env.render() is None


def test_a_world_has_only_the_controls_that_it_has() -> None:
    class Silent(World):
        """Without buttons."""

        description = Description("game", "", "", [], {"mouse_x": 2.0}, 10.0, (4, 6), {})

        def reset(self, start: int, seed: int) -> Picture:
            return Picture(np.zeros((4, 6, 3), np.uint8))

        def step(self, buttons: np.ndarray, axes: np.ndarray) -> Picture:
            assert buttons.shape == (0,)
            return Picture(np.full((4, 6, 3), int(axes[0]), np.uint8))

        def snapshot(self) -> None: ...
        def restore(self, snapshot: None) -> None: ...
        def snapshot_bytes(self) -> int:
            return 0

    env = WorldEnv(Silent())
    assert env.action_space == spaces.Dict({"axes": spaces.Box(-2.0, 2.0, (1,), np.float32)})
    assert env.reset(seed=0)[1]["start"] == 0
    assert env.step({"axes": np.array([2.0])})[0].max() == 2
    with refused("play.render", "human", "rgb_array"):
        WorldEnv(Strip(), render_mode="human")


def test_a_world_without_axes(tmp_path: Path) -> None:
    folder = make_shared(tmp_path / "keys")
    info = DatasetInfo.load(folder / "scenes")
    keys = [*BUTTONS, *AXES]
    info.modalities["controls"] |= {"buttons": keys, "axes": []}
    info.save(folder / "scenes")
    network = lively(buttons=keys, axes=[])
    load_latent_stats(network, info.modalities, "scenes")
    models.save(network, folder)
    env = WorldEnv(load_world(str(folder)))
    assert env.action_space == spaces.Dict({"buttons": spaces.MultiBinary(len(keys))})
    picture, _ = env.reset(seed=0)
    assert env.step(env.action_space.sample())[0].shape == picture.shape


def test_a_start_must_exist(world: LearnedWorld) -> None:
    with refused("play.start", "99"):
        WorldEnv(world).reset(options={"start": 99})


def test_the_how_to_page_from_top_to_bottom(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner finds controls that lead nearer to the goal than none do, and nearer in every round."""
    monkeypatch.chdir(folder.parents[1])
    found = {}
    for block in blocks(REPOSITORY / "docs/how-to/embed.md"):
        if block.language == "python":
            found = {"__name__": "__main__"}
            exec(block.content, found)
    least = found["least"]
    assert least == sorted(least, reverse=True)
    assert least[-1] < least[0] < float(found["idle"])
