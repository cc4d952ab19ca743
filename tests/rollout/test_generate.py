"""Generating a frame: its gradients are those of a whole sequence without a cache, and never reach the past."""

from collections.abc import Collection
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from owl.flow_matching import Step
from owl.models.world_model import Cache, Controls, Streams, WorldTransformer
from owl.nn.attention import Attend, Frames
from owl.nn.transformer import Block
from owl.rollout.engine import Engine
from owl.rollout.generate import (
    SAMPLERS,
    Context,
    Rollout,
    Schedule,
    as_context,
    commit_frame,
    denoise,
    generate_frame,
    generate_frames,
)
from tests.helpers.latents import draw, lively, streams

LEVELS = (1.0, 0.6, 0.3)
PAST = 6  # more frames than any window holds
SCHEDULES = {
    "adams_bashforth": Schedule(LEVELS),
    "consistency": Schedule(LEVELS, "consistency", context_noise=0.1),
    "guidance": Schedule(LEVELS, "euler", guidance=2.5),
}


def noise(network: WorldTransformer, schedule: Schedule, batch: int = 1, seed: int = 0) -> list[Streams]:
    """What `generate_frame` takes for one frame."""
    random = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(batch, 1, *stream.shape, generator=random) for name, stream in network.generated.items()}
        for _ in range(schedule.draws)
    ]


def at(controls: Controls, frame: int) -> Controls:
    return Controls(controls.buttons[:, frame : frame + 1], controls.axes[:, frame : frame + 1])


def committed(network: WorldTransformer, latents: Streams, controls: Controls, schedule: Schedule) -> Cache:
    """A cache of frames that were given."""
    cache = network.new_cache(len(controls.buttons), schedule.copies)
    for t in range(latents["video"].shape[1]):
        frame = Context({name: x[:, t : t + 1] for name, x in latents.items()}, at(controls, t))
        commit_frame(network, cache, frame, schedule.context_noise)
    return cache


def constant_past(network: WorldTransformer, past: int) -> Any:
    """Applies blocks to a whole sequence, of whose first frames no gradient is kept."""

    def apply(block: Block, x: Tensor, condition: Tensor, turns: Tensor, attend: Attend) -> Tensor:
        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            kept = past * network.tokens
            key, value = (torch.cat([x[:, :, :kept].detach(), x[:, :, kept:]], 2) for x in (key, value))
            return attend(query, key, value)

        return block(x, condition, turns, attention)

    return apply


def whole(
    network: WorldTransformer,
    past: Streams,
    controls: Controls,
    schedule: Schedule,
    drawn: list[Streams],
    grad_steps: Collection[int],
) -> Streams:
    """`generate_frame` by passes over the whole sequence, without a cache."""
    now, batch = controls.buttons.shape[1] - 1, len(controls.buttons)
    frames = Frames(torch.arange(now + 1)[None], torch.tensor([0] * now + [1]))
    x, before, earlier = drawn[0], 1.0, Streams()
    for step, (level, following) in enumerate(pairwise([*schedule.noise_levels, 0.0])):
        levels = torch.tensor([schedule.context_noise] * now + [level]).expand(batch, -1)
        found = []
        for aware in (True, False):
            known = torch.ones(batch, now + 1, dtype=torch.bool)
            known[:, -1] = aware
            latents = {name: torch.cat([past[name], x[name]], 1) for name in x}
            shown = Controls(controls.buttons, controls.axes, known)
            velocity = network(latents, levels, shown, frames, apply=constant_past(network, now))
            found.append({name: v[:, -1:] for name, v in velocity.items()})
        conditional, null = found
        v = {name: null[name] + schedule.guidance * (conditional[name] - null[name]) for name in null}
        if step not in grad_steps:
            v = {name: x.detach() for name, x in v.items()}
        fresh = drawn[step + 1] if schedule.sampler == "consistency" else v
        x = {
            n: SAMPLERS[schedule.sampler](Step(x[n], v[n], level, following, earlier.get(n), before, fresh[n]))
            for n in x
        }
        earlier, before = v, level
    return x


def gradients(network: WorldTransformer, frame: Streams) -> dict[str, Tensor]:
    """Towards the weights, of a loss of a frame."""
    network.zero_grad()
    torch.stack([(x - 0.5).square().mean() for x in frame.values()]).sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("past", [0, PAST])
@pytest.mark.parametrize("grad_steps", [(1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_are_those_of_a_whole_sequence_without_a_cache(
    name: str, grad_steps: tuple[int, ...], past: int
) -> None:
    schedule, network = SCHEDULES[name], lively(sink=1, **streams("audio", "motion"))
    latents, _, controls = draw(network, past + 1, batch=2)
    given = {stream: x[:, :past] for stream, x in latents.items()}
    drawn = noise(network, schedule, batch=2)
    cache = committed(network, given, controls, schedule)
    before = [tensor.clone() for tensor in cache.tensors()]
    found = generate_frame(network, cache, at(controls, past), schedule, drawn, grad_steps=grad_steps)
    expected = whole(network, given, controls, schedule, drawn, grad_steps)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    of_cache, of_whole = gradients(network, found), gradients(network, expected)
    assert any(x.abs().max() > 1e-3 for x in of_whole.values())
    torch.testing.assert_close(of_cache, of_whole, atol=1e-5, rtol=1e-4)
    if grad_steps == (0, 1, 2):
        assert all(torch.equal(a, b) for a, b in zip(cache.tensors(), before, strict=True))


def test_the_exit_step_is_the_prediction_of_the_clean_frame() -> None:
    """Self forcing: steps before it without gradients, then x0 = x_t - t v, through which the gradient passes."""
    schedule, network = SCHEDULES["consistency"], lively()
    latents, _, controls = draw(network, PAST + 1)
    given = {"video": latents["video"][:, :PAST]}
    cache, drawn = committed(network, given, controls, schedule), noise(network, schedule)
    shown = at(controls, PAST)
    before, *_ = denoise(network, cache, shown, schedule, drawn)
    found = generate_frame(network, cache, shown, schedule.until(1), drawn, grad_steps=[1])
    level = torch.full((1, 1), LEVELS[1])
    frames = Frames(torch.tensor([[PAST]]), torch.tensor([1]))
    known = replace(shown, known=torch.ones(1, 1, dtype=torch.bool))
    velocity = network(before, level, known, frames, cache=cache.read_only())["video"]
    expected = {"video": before["video"].detach() - LEVELS[1] * velocity}
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(network, found), gradients(network, expected))


def rollout(
    network: WorldTransformer, drawn: list[list[Streams]], joined: bool, grad_steps: Collection[int]
) -> tuple[Cache, list[Tensor]]:
    """Frames from nothing, each given its own noise; the cache at the end."""
    schedule, controls = SCHEDULES["consistency"], draw(network, len(drawn))[2]
    cache, pending, frames = network.new_cache(1), None, []
    for t, draws in enumerate(drawn):
        shown = at(controls, t)
        x = generate_frame(network, cache, shown, schedule, draws, pending=pending, grad_steps=grad_steps)
        frames.append(x["video"])
        pending = Context(x, shown)
        if not joined:
            commit_frame(network, cache, pending, schedule.context_noise)
            pending = None
    assert cache.length == len(drawn) - joined
    return cache, frames


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("grad_steps", [(2,), (0, 1, 2)], ids=str)
def test_no_gradient_reaches_the_past(grad_steps: tuple[int, ...], joined: bool) -> None:
    network = lively()
    drawn = [noise(network, SCHEDULES["consistency"], seed=t) for t in range(4)]
    with torch.no_grad():
        expected = rollout(network, drawn, joined, ())[1]
    leaves = [draws[0]["video"].requires_grad_() for draws in drawn]
    cache, frames = rollout(network, drawn, joined, grad_steps)
    torch.testing.assert_close([x.detach() for x in frames], expected, atol=1e-5, rtol=1e-5)
    assert not any(tensor.requires_grad for tensor in cache.tensors())
    reached = torch.autograd.grad(frames[3].square().sum(), leaves, allow_unused=True)
    assert reached[:3] == (None, None, None)
    assert reached[3] is not None


@pytest.mark.parametrize("name", SCHEDULES)
def test_frames_in_sequence_are_those_made_and_committed_one_by_one(name: str) -> None:
    """And a copy of the state continues as the state itself."""
    schedule, network = SCHEDULES[name], lively(sink=1)
    controls = draw(network, 6)[2]

    def drawn(frame: int) -> list[Streams]:
        samples = noise(network, schedule, seed=frame)
        return [*samples, samples[0]] if schedule.context_noise else samples

    cache, expected = network.new_cache(1, schedule.copies), []
    for t in range(6):
        expected.append(generate_frame(network, cache, at(controls, t), schedule, drawn(t), grad_steps=[1]))
        frame = as_context(expected[-1], at(controls, t), drawn(t)[-1], schedule.context_noise)
        commit_frame(network, cache, frame, schedule.context_noise)
    state = Rollout(network.new_cache(1, schedule.copies))
    found = list(generate_frames(network, state, controls.at(slice(3)), schedule, drawn))
    copy = deepcopy(state)
    for going in (state, copy):
        rest = list(generate_frames(network, going, controls.at(slice(3, 6)), schedule, drawn, [1]))
        torch.testing.assert_close(found + rest, expected, atol=1e-5, rtol=1e-4)
        assert all(x["video"].requires_grad for x in rest)
    assert not found[0]["video"].requires_grad


def test_recomputing_activations_sees_the_cache_as_it_was() -> None:
    """The backward pass comes after later frames were committed."""

    def learned(checkpoint: bool) -> dict[str, Tensor]:
        schedule, network = SCHEDULES["guidance"], lively(checkpoint=checkpoint).train()
        controls = draw(network, 5)[2]
        cache, losses = network.new_cache(1, schedule.copies), []
        for t in range(5):
            drawn, shown = noise(network, schedule, seed=t), at(controls, t)
            x = generate_frame(network, cache, shown, schedule, drawn, grad_steps=[1])
            commit_frame(network, cache, Context(x, shown), schedule.context_noise)
            losses.append(x["video"].square().mean())
        torch.stack(losses).sum().backward()
        return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    torch.testing.assert_close(learned(True), learned(False), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_without_gradients_it_makes_the_engine_s_frames_bit_for_bit(name: str, joined: bool) -> None:
    schedule, network = SCHEDULES[name], lively(sink=1, **streams("audio"))
    controls = draw(network, 8, batch=2)[2]
    engine = Engine(
        network,
        noise_levels=LEVELS,
        sampler=schedule.sampler,
        guidance=schedule.guidance,
        context_noise=schedule.context_noise,
        one_pass=joined,
    )
    engine.reset(batch=2, seed=3)
    random = torch.Generator().manual_seed(3)

    def one() -> Streams:
        return {name: torch.randn(2, 1, *stream.shape, generator=random) for name, stream in network.generated.items()}

    cache, pending = network.new_cache(2, schedule.copies), None
    for t in range(8):
        shown = at(controls, t)
        drawn = [one() for _ in range(schedule.draws)]
        x = generate_frame(network, cache, shown, schedule, drawn, pending=pending)
        level = schedule.context_noise
        pending = as_context(x, shown, one(), level) if level else Context(x, shown)
        if not joined:
            commit_frame(network, cache, pending, level)
            pending = None
        found = {stream: latent[:, 0] for stream, latent in network.restore(x).items()}
        expected = engine.step(controls.buttons[:, t], controls.axes[:, t]).latents
        assert all(torch.equal(found[stream], expected[stream]) for stream in expected)
        assert not x["video"].requires_grad


def test_a_cache_that_is_written_takes_no_gradients() -> None:
    network = lively()
    latents, level, controls = draw(network, 1)
    cache = network.new_cache(1)
    with pytest.raises(RuntimeError, match="read-only"):
        network(latents, level, controls, Frames(torch.tensor([[0]]), torch.tensor([0])), cache=cache)
    frames = Frames(torch.tensor([[0]]), torch.tensor([1]))
    assert network(latents, level, controls, frames, cache=cache.read_only())["video"].requires_grad
