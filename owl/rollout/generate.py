"""Generation of one frame as plain functions of a network, a cache and inputs, with or without gradients.

They are shared by play, evaluation and training on generated frames (self forcing, Huang et al. 2025):

    cache = network.new_cache(batch, schedule.copies)
    for controls, noise in ...:
        x = generate_frame(network, cache, controls, schedule, noise)
        commit_frame(network, cache, Context(x, controls), schedule.context_noise)

`generate_frames` is this loop.

The pass that writes a clean frame to the cache can be combined with the first denoising step of the next frame: pass
the previous frame as ``pending``. The result is the same, and the weights are read once.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from owl.errors import OwlError
from owl.flow_matching import Step, adams_bashforth, add_noise, consistency, euler, noise_levels
from owl.models.sampling import Sampler, Sampling
from owl.models.streams import hide
from owl.models.world_model import Cache, Controls, Streams, WorldTransformer
from owl.nn.attention import Attend, Frames
from owl.nn.transformer import Block

SAMPLERS = {"adams_bashforth": adams_bashforth, "euler": euler, "consistency": consistency}

Apply = Callable[[Block, Tensor, Tensor, Tensor, Attend], Tensor]
"""Applies a block to the arguments of `Block.forward`, for example by compiled code."""


@dataclass(frozen=True)
class Schedule:
    """Settings for denoising frames and committing them.

    Attributes:
        noise_levels: Noise levels of the steps of a frame, from 1 down; the last step ends at 0.
        sampler: "adams_bashforth" (of second order; a single step is Euler's), "euler", or "consistency" for few-step
            students.
        guidance: Weight w of classifier-free guidance (Ho and Salimans 2022), null + w (conditional - null); 1: no
            guidance. Both predictions are copies of the frame within one pass, over one cache.
        context_noise: Noise level at which frames are committed; the training's context noise covers it.
        inner_guidance: Weight w of inner guidance (VideoJAM, Chefer et al. 2025), added as w (conditional - hidden),
            where hidden is the prediction without the input of the streams with ``dropout``, a further copy; 0: none.
            The paper's weights (w1, w2) = (5, 3) are ``guidance`` 6 and ``inner_guidance`` 3.

    Raises:
        OwlError: The noise levels are invalid.
    """

    noise_levels: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    sampler: Sampler = "adams_bashforth"
    guidance: float = 1.0
    context_noise: float = 0.0
    inner_guidance: float = 0.0

    def __post_init__(self) -> None:
        levels = self.noise_levels
        if not levels or levels[0] != 1 or any(a <= b for a, b in pairwise([*levels, 0.0])):
            raise OwlError(
                "engine.levels",
                f"noise_levels are {list(levels)}, expected falling noise levels from 1 to above 0; correct them",
            )

    @classmethod
    def of(cls, sampling: Sampling, inner_guidance: float = 0.0) -> "Schedule":
        """Return the schedule of the settings of a rollout or of play."""
        levels = tuple(noise_levels(sampling.steps, sampling.shift))
        return cls(levels, sampling.sampler, sampling.guidance, sampling.context_noise, inner_guidance)

    @property
    def copies(self) -> int:
        """Noisy copies of a frame in one pass, an argument of `WorldTransformer.new_cache`."""
        return 1 + (self.guidance != 1) + (self.inner_guidance != 0)

    @property
    def draws(self) -> int:
        """Number of noise samples per frame: one initially, and for "consistency" one after each step."""
        return 1 + len(self.noise_levels) if self.sampler == "consistency" else 1

    def until(self, step: int) -> "Schedule":
        """Return the schedule that ends with this step's prediction of the clean frame: self forcing's exit step."""
        return replace(self, noise_levels=self.noise_levels[: step + 1])


class Context(NamedTuple):
    """A frame as context of later ones.

    Attributes:
        latents: Standardised, with the schedule's context noise: "video" float[B, 1, c, h, w], ...
        controls: Controls of the frame.
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
) -> Streams:
    """Generate the frame after the committed ones.

    Without gradients the cache's slots for noisy copies are written in place: shapes and addresses never change. With
    gradients nothing is written. Gradients reach the weights through this frame only: the cache is constant, also if
    later frames are committed before the backward pass recomputes activations.

    Args:
        network: The world model.
        cache: Cache of the previous frames, created with ``schedule.copies``.
        controls: Controls of this frame, [B, 1, ...].
        schedule: Denoising schedule.
        noise: ``schedule.draws`` samples of normal noise of one frame, "video" float[B, 1, c, h, w], ...: the first is
            the initial value, the others are used by the sampler "consistency", one after each step.
        pending: The previous frame if it is not yet committed: the first step's pass commits it. If the first step
            carries gradients, it is committed by a separate pass without gradients.
        grad_steps: Denoising steps, from 0, whose evaluation of the network carries gradients; the velocities of other
            steps are constants.

    Returns:
        The clean frame, standardised, float32, shaped like the noise.
    """
    *_, clean = denoise(network, cache, controls, schedule, noise, pending=pending, grad_steps=grad_steps)
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
    """Yield the frame after each step; arguments as of `generate_frame`.

    ``apply`` applies a block in steps without gradients; None: the block itself.
    """
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
        if schedule.inner_guidance != 0:
            parts.append(_Part(without_hints(network, x), t, controls, schedule.copies, time))
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
    """Write a frame to the cache in place, in a separate pass without gradients.

    Args:
        network: The world model.
        cache: Cache of the previous frames.
        frame: The next frame.
        context_noise: Noise level of its latents.
        apply: Function that applies a block; None: the block itself.
    """
    _pass(network, cache, [_Part(frame.latents, context_noise, frame.controls, 0, cache.length)], apply)
    cache.length += 1


@dataclass
class Rollout:
    """State of a rollout between two frames; a deep copy of it can be continued separately.

    Attributes:
        cache: Cache of the previous frames.
        pending: The last frame, if it is not yet committed.
    """

    cache: Cache
    pending: Context | None = None


def generate_frames(
    network: WorldTransformer,
    rollout: Rollout,
    controls: Controls,
    schedule: Schedule,
    noise: Callable[[int], Sequence[Streams]],
    grad_steps: Collection[int] = (),
) -> Iterator[Streams]:
    """Generate consecutive frames; each becomes context of the next ones, without gradient.

    Args:
        network: The world model.
        rollout: State after the previous frames; updated with every frame.
        controls: Controls of all frames to generate, [B, F, ...].
        schedule: Denoising schedule.
        noise: Called with the number of a frame since the start of the rollout; returns its normal noise, as
            `generate_frame` takes it and, if the schedule has context noise, one more sample for its context.
        grad_steps: See `generate_frame`.

    Yields:
        The frames, standardised, float32, "video" float[B, 1, c, h, w], ...
    """
    for frame in range(controls.buttons.shape[1]):
        shown = controls.at(slice(frame, frame + 1))
        drawn = noise(rollout.cache.length + (rollout.pending is not None))
        x = generate_frame(
            network, rollout.cache, shown, schedule, drawn, pending=rollout.pending, grad_steps=grad_steps
        )
        clean = {name: latent.detach() for name, latent in x.items()}
        level = schedule.context_noise
        rollout.pending = as_context(clean, shown, drawn[-1], level) if level else Context(clean, shown)
        yield x


def as_context(latents: Streams, controls: Controls, noise: Streams, context_noise: float) -> Context:
    """Add context noise to a clean frame, for `commit_frame`.

    Args:
        latents: Standardised, float[B, 1, ...].
        controls: Controls of the frame.
        noise: Normal noise shaped like the latents.
        context_noise: Noise level.
    """
    level = torch.full(controls.buttons.shape[:2], context_noise, device=controls.buttons.device)
    return Context({name: add_noise(x, noise[name], level) for name, x in latents.items()}, controls)


def _pass(network: WorldTransformer, cache: Cache, parts: list[_Part], apply: Apply | None) -> Streams:
    """Run the network on a sequence of frames and return the velocities of all."""
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


def without_hints(network: WorldTransformer, x: Streams) -> Streams:
    """Hide the input of the streams with ``dropout``, for inner guidance."""
    return {name: hide(latent) if network.generated[name].dropout > 0 else latent for name, latent in x.items()}


def _guided(velocity: Streams, schedule: Schedule) -> Streams:
    """Return the velocity of the current frame from those of a pass, in float32."""
    guided = {}
    for name, v in velocity.items():
        conditional, *others = v[:, v.shape[1] - schedule.copies :].float().split(1, 1)
        guided[name] = conditional
        weights = [w for w in (schedule.guidance - 1, schedule.inner_guidance) if w != 0]
        for weight, other in zip(weights, others, strict=True):
            guided[name] = guided[name] + weight * (conditional - other)
    return guided
