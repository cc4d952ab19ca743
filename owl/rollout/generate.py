"""One frame of a rollout as plain functions of a network, a cache and inputs, with or without gradients.

Play, evaluation and training on a model's own frames (self forcing, Huang et al. 2025) share them:

    cache = network.new_cache(batch, schedule.copies)
    for controls, noise in ...:
        x = generate_frame(network, cache, controls, schedule, noise)
        commit_frame(network, cache, Context(x, controls), schedule.context_noise)

Two passes per frame, one to denoise it and one to write its clean version into the cache, can be made one: given the
frame before as ``pending``, the first denoising step commits it too. It is exact, and reads the weights once.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from owl.errors import OwlError
from owl.flow_matching import Step, adams_bashforth, add_noise, consistency, euler
from owl.models.world_model import Cache, Controls, Streams, WorldTransformer
from owl.nn.attention import Attend, Frames
from owl.nn.transformer import Block

Sampler = Literal["adams_bashforth", "euler", "consistency"]
SAMPLERS = {"adams_bashforth": adams_bashforth, "euler": euler, "consistency": consistency}

Apply = Callable[[Block, Tensor, Tensor, Tensor, Attend], Tensor]
"""Applies a block to what `Block.forward` takes, such as compiled code."""


@dataclass(frozen=True)
class Schedule:
    """How frames are denoised, and how they become context.

    Attributes:
        noise_levels: Noise levels of the steps of a frame, from 1 down; the last step ends at 0.
        sampler: "adams_bashforth" (of second order; a single step is Euler's), "euler", or "consistency" for few-step
            students.
        guidance: Weight w of classifier-free guidance (Ho and Salimans 2022), null + w (conditional - null); 1 costs
            nothing. Both predictions are copies of the frame within one pass, over one cache.
        context_noise: Noise level at which frames are committed; the training's context noise covers it.

    Raises:
        OwlError: The settings make no sense.
    """

    noise_levels: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    sampler: Sampler = "adams_bashforth"
    guidance: float = 1.0
    context_noise: float = 0.0

    def __post_init__(self) -> None:
        levels = self.noise_levels
        if not levels or levels[0] != 1 or any(a <= b for a, b in pairwise([*levels, 0.0])):
            raise OwlError(
                "engine.levels",
                f"noise_levels are {list(levels)}, expected falling noise levels from 1 to above 0; correct them",
            )
        if self.sampler not in SAMPLERS:
            raise OwlError("engine.sampler", f'sampler is "{self.sampler}", expected {" or ".join(SAMPLERS)}')

    @property
    def copies(self) -> int:
        """Noisy copies of a frame in one pass, for which `WorldTransformer.new_cache` makes room."""
        return 1 if self.guidance == 1 else 2

    @property
    def draws(self) -> int:
        """How often normal noise is drawn for a frame: to begin with, and for "consistency" after each step."""
        return 1 + len(self.noise_levels) if self.sampler == "consistency" else 1

    def until(self, step: int) -> "Schedule":
        """The schedule that ends with this step's prediction of the clean frame: self forcing's exit step."""
        return replace(self, noise_levels=self.noise_levels[: step + 1])


class Context(NamedTuple):
    """A frame as later ones see it.

    Attributes:
        latents: Standardised, with the schedule's context noise: "video" float[B, 1, c, h, w], ...
        controls: Of this one frame.
    """

    latents: Streams
    controls: Controls


class _Part(NamedTuple):
    """A frame in a pass: copy 0 commits it."""

    latents: Streams
    noise_level: float
    controls: Controls
    copy: int
    time: int


def generate_frame(
    network: WorldTransformer,
    cache: Cache,
    controls: Controls,
    schedule: Schedule,
    noise: Sequence[Streams],
    *,
    pending: Context | None = None,
    grad_steps: Collection[int] = (),
    apply: Apply | None = None,
) -> Streams:
    """Generate the frame after those that are committed.

    Without gradients the cache's places for noisy copies are written in place: shapes and addresses never change.
    With gradients nothing is written. They reach the weights by this frame alone: what is cached is constant, also
    where later frames are committed before the backward pass recomputes activations.

    Args:
        network: The world model.
        cache: Of the frames before, made with ``schedule.copies``.
        controls: Of this one frame, [B, 1, ...].
        schedule: How it is denoised.
        noise: ``schedule.draws`` times normal noise of one frame, "video" float[B, 1, c, h, w], ...: the first is
            where it begins, the others are for the sampler "consistency", one after each step.
        pending: The frame before where it is not committed yet: the first step's pass does that too. A pass of its own
            does where the first step carries gradients, which the past has none of.
        grad_steps: Denoising steps, counted from 0, whose evaluation of the network carries gradients; the other
            steps' velocities are constants.
        apply: What applies a block in steps without gradients; None: the block itself.

    Returns:
        The clean frame, standardised, float32, shaped like the noise.
    """
    *_, clean = denoise(network, cache, controls, schedule, noise, pending=pending, grad_steps=grad_steps, apply=apply)
    return clean


def denoise(
    network: WorldTransformer,
    cache: Cache,
    controls: Controls,
    schedule: Schedule,
    noise: Sequence[Streams],
    *,
    pending: Context | None = None,
    grad_steps: Collection[int] = (),
    apply: Apply | None = None,
) -> Iterator[Streams]:
    """Yield the frame after each step of `generate_frame`, which see."""
    if pending is not None and 0 in grad_steps:
        commit_frame(network, cache, pending, schedule.context_noise, apply)
        pending = None
    time = cache.length + (pending is not None)
    constant: Cache | None = None
    x, previous_t, previous = noise[0], 1.0, Streams()
    for step, (t, next_t) in enumerate(pairwise([*schedule.noise_levels, 0.0])):
        parts = [_Part(x, t, controls, 1, time)]
        if schedule.guidance != 1:
            unknown = torch.zeros_like(controls.buttons[..., 0], dtype=torch.bool)
            parts.append(_Part(x, t, replace(controls, known=unknown), 2, time))
        if step in grad_steps:
            constant = constant or cache.read_only()
            velocity = _guided(_pass(network, constant, parts, None), schedule)
        else:
            if pending is not None:
                parts.insert(0, _Part(pending.latents, schedule.context_noise, pending.controls, 0, cache.length))
            with torch.no_grad():
                velocity = _guided(_pass(network, cache, parts, apply), schedule)
        if pending is not None:
            cache.length, pending = cache.length + 1, None
        fresh = noise[step + 1] if schedule.sampler == "consistency" else velocity
        x = {
            name: SAMPLERS[schedule.sampler](Step(x[name], v, t, next_t, previous.get(name), previous_t, fresh[name]))
            for name, v in velocity.items()
        }
        previous, previous_t = velocity, t
        yield x


@torch.no_grad()
def commit_frame(
    network: WorldTransformer, cache: Cache, frame: Context, context_noise: float = 0.0, apply: Apply | None = None
) -> None:
    """Write a frame into the cache, in place and without gradients, by a pass of its own.

    Args:
        network: The world model.
        cache: Of the frames before it.
        frame: The frame that follows them.
        context_noise: Noise level of its latents.
        apply: What applies a block; None: the block itself.
    """
    _pass(network, cache, [_Part(frame.latents, context_noise, frame.controls, 0, cache.length)], apply)
    cache.length += 1


def as_context(latents: Streams, controls: Controls, noise: Streams, context_noise: float) -> Context:
    """A clean frame with context noise, ready to be committed.

    Args:
        latents: Standardised, float[B, 1, ...].
        controls: Of this one frame.
        noise: Normal noise shaped like the latents.
        context_noise: Noise level.
    """
    level = torch.full(controls.buttons.shape[:2], context_noise, device=controls.buttons.device)
    return Context({name: add_noise(x, noise[name], level) for name, x in latents.items()}, controls)


def _pass(network: WorldTransformer, cache: Cache, parts: list[_Part], apply: Apply | None) -> Streams:
    """Run the network on frames one after another; returns the velocities of all."""
    batch, device = len(parts[0].controls.buttons), parts[0].controls.buttons.device
    velocity: Streams = network(
        {name: torch.cat([part.latents[name] for part in parts], 1) for name in network.generated},
        torch.tensor([part.noise_level for part in parts], device=device).expand(batch, -1),
        Controls.joined([part.controls for part in parts]),
        Frames(
            torch.tensor([[part.time for part in parts]], device=device),
            torch.tensor([part.copy for part in parts], device=device),
        ),
        cache=cache,
        apply=apply,
    )
    return velocity


def _guided(velocity: Streams, schedule: Schedule) -> Streams:
    """Of the velocities of a pass, that of the frame at hand, in float32."""
    if schedule.guidance == 1:
        return {name: v[:, -1:].float() for name, v in velocity.items()}
    velocity = {name: v.float() for name, v in velocity.items()}
    return {name: v[:, -1:] + schedule.guidance * (v[:, -2:-1] - v[:, -1:]) for name, v in velocity.items()}
