"""The state of the streaming engine: snapshots, seeds and changes of the schedule, and nothing of it grows."""

from typing import Any

import pytest
import torch

from owl.models.world_model import Controls
from owl.rollout.engine import Engine
from owl.rollout.generate import Schedule
from tests.helpers.errors import refused
from tests.helpers.latents import draw, lively, streams
from tests.helpers.rollouts import LEVELS, at, roll, same


@pytest.mark.parametrize("one_pass", [True, False])
def test_a_snapshot_continues_bit_for_bit(one_pass: bool) -> None:
    network = lively(sink=1)
    controls = draw(network, 20)[2]
    settings: dict[str, Any] = {"noise_levels": LEVELS, "sampler": "consistency", "guidance": 2, "context_noise": 0.1}
    engine = Engine(network, one_pass=one_pass, **settings)
    engine.reset(seed=1)
    for t in range(8):
        engine.step(*at(controls, t))
    snapshot = engine.snapshot()
    expected = [engine.step(*at(controls, t)).latents for t in range(8, 20)]
    engine.restore(snapshot)
    assert same([engine.step(*at(controls, t)).latents for t in range(8, 20)], expected)
    another = Engine(network, one_pass=one_pass, **settings)
    another.reset(seed=7)
    another.step(*at(controls, 3))
    another.restore(snapshot)  # which neither continuation has changed
    assert same([another.step(*at(controls, t)).latents for t in range(8, 20)], expected)


def test_a_seed_decides_everything_and_a_reset_forgets_everything() -> None:
    network = lively()
    latents, _, controls = draw(network, 9)
    context = {"video": latents["video"][:, :4]}
    engine = Engine(network, noise_levels=LEVELS, sampler="consistency")
    first = roll(engine, controls, context, seed=4)
    torch.manual_seed(99)  # the global state plays no part
    assert same(roll(engine, controls, context, seed=4), first)
    assert not same(roll(engine, controls, context, seed=5), first)
    assert same(roll(engine, controls, context, seed=4), first)


@pytest.mark.parametrize("one_pass", [True, False])
def test_nothing_grows_with_time(one_pass: bool) -> None:
    network = lively(sink=1)
    controls = draw(network, 120)[2]
    engine = Engine(network, noise_levels=(1.0, 0.5), guidance=2, one_pass=one_pass)
    engine.reset()
    places = [(tensor.data_ptr(), tensor.shape) for tensor in engine.cache.tensors()]
    sizes = []
    for t in range(120):
        frame = engine.step(*at(controls, t))
        assert frame.latents["video"].isfinite().all()
        if t % 40 == 39:
            sizes.append(sum(tensor.numel() for tensor in engine.snapshot().cache))
    assert [(tensor.data_ptr(), tensor.shape) for tensor in engine.cache.tensors()] == places
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(("before", "after"), [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0)])
def test_the_schedule_can_change_between_frames(before: float, after: float) -> None:
    """As if the frames so far had been given to an engine with the new schedule as context."""
    network = lively()
    _, _, controls = draw(network, 8)
    batch = len(controls.buttons)
    changed = Engine(network, noise_levels=LEVELS, guidance=before)
    changed.reset(batch=batch)
    first = [changed.step(*at(controls, t)).latents for t in range(4)]
    random = changed.snapshot().random
    changed.change(Schedule((1.0, 0.5), guidance=after))
    assert changed.time == 4
    found = [changed.step(*at(controls, t)).latents for t in range(4, 8)]

    other = Engine(network, guidance=5.0)
    other.change(Schedule((1.0, 0.5), guidance=after))  # before the rollout
    context = {name: torch.stack([frame[name] for frame in first], 1) for name in first[0]}
    other.reset(context, Controls(controls.buttons[:, :4], controls.axes[:, :4]))
    state = other.snapshot()
    state.random = random
    other.restore(state)
    for t, frame in zip(range(4, 8), found, strict=True):
        expected = other.step(*at(controls, t)).latents
        for name, latent in frame.items():
            torch.testing.assert_close(latent, expected[name], rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_is_reported() -> None:
    network = lively(**streams("audio"))
    engine = Engine(network, noise_levels=LEVELS)
    latents, _, controls = draw(network, 4, batch=2)
    for call in (engine.snapshot, lambda: engine.step(*at(controls, 0))):
        with refused("engine.not-reset", "reset"):
            call()
    with refused("context.controls", "controls"):
        engine.reset(latents)
    with refused("context.empty", "0 frames"):
        empty = Controls(controls.buttons[:, :0], controls.axes[:, :0])
        engine.reset({name: x[:, :0] for name, x in latents.items()}, empty)
    with refused("context.shape", "audio is missing"):
        engine.reset({"video": latents["video"]}, controls)
    with refused("context.shape", "video is [2, 3, 2, 4, 6]", "[2, 4, "):
        engine.reset(latents | {"video": latents["video"][:, :3]}, controls)
    with refused("context.shape", "buttons are [2, 4, 2]", "[2, 4, 3]"):
        engine.reset(latents, Controls(controls.buttons[..., :2], controls.axes))
    for bad in (torch.nan, torch.inf):
        damaged = latents["audio"].clone()
        damaged[1, 2, 0, 0] = bad
        with refused("context.non-finite", "audio"):
            engine.reset(latents | {"audio": damaged}, controls)
    engine.reset(latents, controls)
    with refused("engine.shape", "buttons", "[1, 3]", "[2, 3]"):
        engine.step(*(x[:1] for x in at(controls, 0)))
    with refused("engine.shape", "axes", "[2, 1]"):
        engine.step(controls.buttons[:, 0], controls.axes[:, 0, :1])
    with refused("engine.shape", "conditioning is given", "takes nothing"):
        engine.step(*at(controls, 0), {"conditioning": torch.zeros(2, 1, 4, 6)})
    engine.step(*at(controls, 0))  # refusals have harmed nothing
    snapshot = engine.snapshot()
    engine.reset(batch=3)
    with refused("engine.snapshot", "2 rollouts", "the engine 3"):
        engine.restore(snapshot)
    guided = Engine(network, noise_levels=LEVELS, guidance=2)
    guided.reset(batch=2)
    with refused("engine.other-snapshot", "guidance"):
        guided.restore(snapshot)
