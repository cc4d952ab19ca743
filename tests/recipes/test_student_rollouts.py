"""Rollouts of a student: where gradients go, that both passes make the same frames, and what they need of memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from owl.flow_matching import noise_levels
from owl.models.world_model import WorldTransformer
from owl.recipes.memory import saved_bytes
from owl.recipes.randomness import step_generator
from owl.recipes.student_rollouts import Generated, Plan, StudentRollouts
from owl.rollout.engine import Engine
from owl.rollout.generate import Schedule
from tests.helpers.latents import draw, lively, streams

LONGEST, LAST, CONTEXT, BATCH = 9, 3, 2, 2
"""More frames than any window of the network holds."""


def rollouts(network: WorldTransformer, **changes: Any) -> StudentRollouts:
    schedule = Schedule(tuple(noise_levels(3, 2.0)), "consistency", context_noise=changes.pop("context_noise", 0.0))
    settings = {"schedule": schedule, "frames": LONGEST, "last": LAST, "window": 5, "context": CONTEXT}
    return StudentRollouts(network, **{**settings, **changes})


def generators(frame: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * sample + frame) for sample in range(BATCH)]


def generate(made: StudentRollouts, plan: Plan, **options: Any) -> Generated:
    latents, _, controls = draw(made.network, made.context + made.frames, BATCH)
    return made(latents, controls, plan, options.pop("generators", generators), **options)


@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_no_gradient_crosses_from_one_frame_to_another(exit_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """dL_j / d(noise of frame i) is exactly nothing for i < j."""
    made, noise = rollouts(lively()), {}
    drawn = StudentRollouts._noise

    def leaves(self: StudentRollouts, *arguments: Any) -> Any:
        of = drawn(self, *arguments)

        def leaf(frame: int) -> Any:
            samples = of(frame)
            noise[frame] = samples[exit_step]["video"].requires_grad_()  # what the exit step adds, or starts with
            return samples

        return leaf

    monkeypatch.setattr(StudentRollouts, "_noise", leaves)
    found = generate(made, Plan(exit_step, LONGEST), grad=True)
    assert not found.clip["video"].requires_grad
    for j in range(LAST):
        reached = torch.autograd.grad(
            found.last["video"][:, j].square().sum(), list(noise.values()), retain_graph=True, allow_unused=True
        )
        by_frame = dict(zip(noise, reached, strict=True))
        own = CONTEXT + LONGEST - LAST + j
        assert by_frame.pop(own) is not None
        assert all(gradient is None or not gradient.any() for gradient in by_frame.values())


@pytest.mark.parametrize("context_noise", [0.0, 0.1])
def test_frames_are_those_of_the_engine_which_plays_the_student(context_noise: float) -> None:
    network = lively(sink=1, **streams("audio"))
    made = rollouts(network, context_noise=context_noise, window=CONTEXT + LONGEST)
    found = generate(made, made.whole)
    latents, _, controls = draw(network, CONTEXT + LONGEST, BATCH)
    engine = Engine(network, noise_levels=noise_levels(3, 2.0), sampler="consistency", context_noise=context_noise)
    noise = made._noise(latents, made.schedule, generators)
    queue: list[Any] = []
    engine._noise = lambda: queue.pop(0)  # type: ignore[method-assign]
    queue += [noise(t)[-1] for t in range(CONTEXT)] if context_noise else []
    given = {name: x[:, :CONTEXT] for name, x in network.restore(latents).items()}
    engine.reset(given, controls.at(slice(CONTEXT)))
    for t in range(CONTEXT, CONTEXT + LONGEST):
        queue += noise(t)
        frame = network.standardize(
            {n: x[:, None] for n, x in engine.step(controls.buttons[:, t], controls.axes[:, t]).latents.items()}
        )
        for name, x in frame.items():
            torch.testing.assert_close(found.clip[name][:, t : t + 1], x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.clip["video"][:, :CONTEXT], latents["video"][:, :CONTEXT])


def gradient(network: WorldTransformer, frames: list[Tensor]) -> dict[str, Tensor]:
    """Towards the weights, of frames whose graphs are freed one by one."""
    network.zero_grad()
    for frame in frames:
        (frame - 0.5).square().sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("exit_step", [0, 2])
def test_gradients_are_the_same_in_one_pass_and_in_two_with_and_without_recomputation(exit_step: int) -> None:
    plan, found = Plan(exit_step, LONGEST - 1), []
    for checkpoint in (False, True):
        network = lively(checkpoint=checkpoint).train()
        made = rollouts(network, context_noise=0.1)
        whole = generate(made, plan, grad=True)
        found.append(gradient(network, [whole.last["video"]]))
        twice = generate(made, plan, again=True)
        assert not twice.last["video"].requires_grad
        torch.testing.assert_close(twice.clip, whole.clip, atol=1e-5, rtol=1e-5)
        network.zero_grad()
        for t, frame in enumerate(twice.again):
            torch.testing.assert_close(frame["video"][:, 0], twice.last["video"][:, t], atol=1e-4, rtol=1e-4)
            (frame["video"] - 0.5).square().sum().backward()  # before the next frame is generated
        found.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    assert found[0]["video_in.weight"].abs().max() > 1e-3
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-4)


def test_the_clip_is_the_end_of_the_rollout_and_its_controls_are_those_of_its_frames() -> None:
    made = rollouts(lively())
    controls = draw(made.network, CONTEXT + LONGEST, BATCH)[2]
    for frames, begin in ((LONGEST, CONTEXT + LONGEST - 5), (LAST, 0)):
        found = generate(made, Plan(0, frames))
        end = CONTEXT + frames
        assert found.clip["video"].shape[1] == end - begin
        assert torch.equal(found.controls.axes, controls.axes[:, begin:end])
        torch.testing.assert_close(found.clip["video"][:, -LAST:], found.last["video"])
        assert found.again is None
    without = generate(rollouts(lively(), context=0), Plan(1, LONGEST))
    assert without.clip["video"].shape[1] == 5


def test_plans_cover_all_exit_steps_and_lengths_and_are_those_of_their_step() -> None:
    made = rollouts(lively())
    plans = [made.plan(step) for step in range(300)]
    assert plans == [made.plan(step) for step in range(300)]
    assert {plan.exit_step for plan in plans} == {0, 1, 2}
    assert {plan.frames for plan in plans} == set(range(LAST, LONGEST + 1))
    assert made.whole == Plan(2, LONGEST)
    assert (
        step_generator(0, 1, torch.device("cpu"), 1).initial_seed()
        != step_generator(0, 1, torch.device("cpu")).initial_seed()
    )


def test_the_memory_of_a_frame_is_measured_and_does_not_depend_on_the_rollout() -> None:
    network = lively()
    made, longer = rollouts(network), rollouts(network, frames=40)
    latents, _, controls = draw(network, CONTEXT + 40, BATCH)
    measured = made.bytes_per_frame(latents, controls, generators)
    assert measured == longer.bytes_per_frame(latents, controls, generators)
    kept = [saved_bytes(lambda k=k: generate(rollouts(network, last=k), Plan(0, LONGEST), grad=True)) for k in (2, 4)]
    assert kept[1] - kept[0] == pytest.approx(2 * measured, rel=0.02)
