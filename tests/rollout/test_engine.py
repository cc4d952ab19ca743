"""The streaming engine gives what whole sequences without any cache give."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from owl.models.world_model import Controls, Streams, WorldTransformer
from owl.nn.attention import Frames
from owl.nn.placement import placement
from owl.rollout.engine import Engine
from tests.helpers.errors import refused
from tests.helpers.latents import TINY, draw, lively, streams
from tests.helpers.rollouts import LEVELS, Reference, at, roll, same

SETTINGS: dict[str, dict[str, Any]] = {
    "adams_bashforth": {},
    "euler": {"sampler": "euler"},
    "consistency": {"sampler": "consistency"},
    "guidance": {"guidance": 2.5},
    "inner guidance": {"inner_guidance": 1.5},
    "context noise": {"context_noise": 0.1},
    "everything": {"sampler": "consistency", "guidance": 0.5, "context_noise": 0.2, "inner_guidance": 0.5},
}


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("known", [0, 1, 9], ids=["from nothing", "from one frame", "context longer than any window"])
@pytest.mark.parametrize("name", SETTINGS)
def test_streaming_equals_whole_sequences_without_a_cache(name: str, known: int, one_pass: bool) -> None:
    settings: dict[str, Any] = {"sampler": "adams_bashforth", "context_noise": 0.0, "guidance": 1.0}
    settings |= {"inner_guidance": 0.0} | SETTINGS[name]
    declared = streams("audio", "motion")["streams"]
    declared["audio"] |= {"sinks": 1}
    declared["motion"] |= {"dropout": 0.2}
    network = lively(sink=1, streams=declared)
    network.video_mean.fill_(0.3)
    network.audio_std.fill_(2)
    latents, _, controls = draw(network, known + 10, batch=2)
    context = {stream: x[:, :known] for stream, x in latents.items()} if known else None
    expected = Reference(network, **settings).roll(controls, context, seed=3)
    found = roll(Engine(network, noise_levels=LEVELS, one_pass=one_pass, **settings), controls, context, seed=3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)  # of ten frames, each on those before


def test_hundreds_of_frames_equal_a_sliding_window_over_the_whole_sequence() -> None:
    """One step a frame, so that one pass over [clean frames, noisy frames] must give every frame again."""
    frames = 300
    network = lively(**streams(video=(2, 4, 4)), sink=2, window=3, global_window=7)
    controls = draw(network, frames)[2]
    engine = Engine(network, noise_levels=(1.0,))
    generated = torch.stack([frame["video"] for frame in roll(engine, controls, seed=5)], 1)
    random = torch.Generator().manual_seed(5)
    noise = torch.cat([torch.randn(1, 1, 2, 4, 4, generator=random) for _ in range(frames)], 1)
    now = torch.arange(frames)
    layout = Frames(torch.cat([now, now])[None], torch.cat([torch.zeros(frames), torch.ones(frames)]).long())
    doubled = Controls(controls.buttons.repeat(1, 2, 1), controls.axes.repeat(1, 2, 1))
    level = torch.cat([torch.zeros(1, frames), torch.ones(1, frames)], 1)
    with torch.no_grad():
        velocity = network({"video": torch.cat([generated, noise], 1)}, level, doubled, layout)["video"][:, frames:]
    torch.testing.assert_close(generated, noise - velocity, atol=1e-5, rtol=1e-5)


def test_an_action_changes_its_frame_and_no_earlier_one() -> None:
    network = lively()
    controls = draw(network, 12)[2]
    before = roll(Engine(network, noise_levels=LEVELS), controls)
    other = Controls(controls.buttons.clone(), controls.axes.clone())
    other.buttons[:, 6] = 1 - other.buttons[:, 6]
    after = roll(Engine(network, noise_levels=LEVELS), other)
    assert [torch.equal(a["video"], b["video"]) for a, b in zip(after, before, strict=True)] == [True] * 6 + [False] * 6


def test_rollouts_side_by_side_do_not_touch_each_other() -> None:
    network = lively(**streams("audio"))
    latents, _, controls = draw(network, 9, batch=2)
    context = {name: x[:, :3] for name, x in latents.items()}
    engine = Engine(network, noise_levels=LEVELS, guidance=2)
    before = roll(engine, controls, context)
    other = Controls(controls.buttons.clone(), controls.axes.clone())
    other.axes[1] += 1
    changed = {name: torch.cat([x[:1], x[1:] + 1]) for name, x in context.items()}
    after = roll(engine, other, changed)
    for a, b in zip(after, before, strict=True):
        for name in b:
            assert torch.equal(a[name][0], b[name][0])
            assert not torch.equal(a[name][1], b[name][1])


def count_passes(engine: Engine, controls: Controls) -> list[int]:
    """Frames in each pass of the third generated frame."""
    engine.reset(batch=len(controls.buttons))
    for t in range(2):
        engine.step(*at(controls, t))
    seen: list[int] = []
    handle = engine.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]["video"].shape[1]))
    engine.step(*at(controls, 2))
    handle.remove()
    return seen


def test_one_pass_commits_along_with_the_first_denoising_step() -> None:
    network = lively()
    controls = draw(network, 3)[2]
    assert count_passes(Engine(network, noise_levels=LEVELS), controls) == [2, 1, 1]
    assert count_passes(Engine(network, noise_levels=LEVELS, one_pass=False), controls) == [1, 1, 1, 1]
    assert count_passes(Engine(network, noise_levels=LEVELS, guidance=3), controls) == [3, 2, 2]
    moving = lively(streams=streams("motion")["streams"] | {"motion": {"shape": [1, 4, 6], "patch": 2, "dropout": 0.2}})
    guided = Engine(moving, noise_levels=LEVELS, guidance=6, inner_guidance=3)
    assert count_passes(guided, controls) == [4, 3, 3]
    with refused("engine.guidance", "inner_guidance is 3", "no stream of video"):
        Engine(network, inner_guidance=3)


def test_the_network_given_is_left_as_it_is() -> None:
    network = lively().train()
    controls = draw(network, 3)[2]
    engine = Engine(network, noise_levels=LEVELS, dtype=torch.bfloat16)
    coarse = roll(engine, controls)
    assert network.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in network.parameters())
    fine = roll(Engine(network, noise_levels=LEVELS), controls)
    torch.testing.assert_close(coarse[0]["video"], fine[0]["video"], atol=0.3, rtol=0.05)


class Still(WorldTransformer):
    """One whose velocity is the same everywhere, and a number of its dtype, so that only the integrator rounds."""

    def forward(self, latents: Streams, *given: Any, **more: Any) -> Streams:
        return {name: torch.full_like(x, 0.25, dtype=torch.bfloat16) for name, x in latents.items()}


def test_frames_and_statistics_are_of_full_precision_in_an_engine_of_less() -> None:
    network = Still(**TINY | streams("audio"))
    for name in network.streams:
        getattr(network, f"{name}_mean").fill_(1.001)
        getattr(network, f"{name}_std").fill_(0.3003)
    latents, _, controls = draw(network, 4)
    context = {name: x[:, :2] for name, x in latents.items()}
    settings: dict[str, Any] = {"noise_levels": LEVELS, "sampler": "euler", "context_noise": 0.1}
    expected = roll(Engine(network, **settings), controls, context)
    engine = Engine(network, dtype=torch.bfloat16, **settings)
    assert same(roll(engine, controls, context), expected)  # nothing but the network's own numbers is rounded
    assert placement(engine.network).dtype == torch.bfloat16
    assert all(layer.key.dtype == layer.value.dtype == torch.bfloat16 for layer in engine.cache.layers)
    assert engine._pending is not None
    assert all(x.dtype == torch.float32 for x in engine._pending[0].values())
    rough = Engine(deepcopy(network).bfloat16(), **settings)  # also where it comes in that dtype
    assert same(roll(rough, controls, context), expected)


def test_a_context_is_committed_with_its_conditioning() -> None:
    network = lively(**streams("conditioning", channels=2))
    latents, _, controls = draw(network, 4)
    scene = torch.randn(1, 4, 2, 4, 6)
    engine = Engine(network, noise_levels=LEVELS, sampler="euler")
    engine.reset(
        {"video": latents["video"][:, :3]},
        Controls(controls.buttons[:, :3], controls.axes[:, :3], given={"conditioning": scene[:, :3]}),
    )
    found = engine.step(*at(controls, 3), {"conditioning": scene[:, 3]}).latents["video"]
    # the same by one sequence without a cache: the context clean, the last frame from the engine's noise
    x = torch.randn(1, 1, *network.streams["video"].shape, generator=torch.Generator().manual_seed(0))
    for level, following in zip(LEVELS, [*LEVELS[1:], 0.0], strict=True):
        whole = {"video": torch.cat([latents["video"][:, :3], x], 1)}
        levels = torch.tensor([[0, 0, 0, level]])
        velocity = network(whole, levels, Controls(controls.buttons, controls.axes, given={"conditioning": scene}))[
            "video"
        ][:, 3:]
        x = x + (following - level) * velocity
    torch.testing.assert_close(found, x[:, 0].detach(), atol=1e-5, rtol=1e-5)


def test_a_conditioning_is_seen_by_the_frame_that_it_is_given_for() -> None:
    network = lively(**streams("conditioning", channels=2))
    controls = draw(network, 3, batch=2)[2]
    engine, conditioning = Engine(network, noise_levels=LEVELS, guidance=2), torch.randn(2, 2, 4, 6)

    def second(given: Tensor | None) -> Tensor:
        engine.reset(batch=2)
        engine.step(*at(controls, 0))
        scene = None if given is None else {"conditioning": given}
        return engine.step(*at(controls, 1), scene).latents["video"]

    network.conditioning_mean.fill_(0.5)
    engine = Engine(network, noise_levels=LEVELS, guidance=2)
    assert torch.equal(second(None), second(torch.full((2, 2, 4, 6), 0.5)))  # standardised: nothing is the mean
    assert not torch.equal(second(None), second(conditioning))
    with refused("engine.shape", "conditioning", "[2, 2, 4]", "[2, 2, 4, 6]"):
        second(conditioning[..., 0])
