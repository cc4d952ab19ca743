"""Rollouts of a few-step student, whose last frames carry gradients, in one pass or in two."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch

from owl.models.world_model import Controls, Streams, WorldTransformer
from owl.nn.placement import placement
from owl.recipes.memory import saved_bytes
from owl.recipes.presentation import present
from owl.recipes.randomness import step_generator
from owl.rollout.clips import draw
from owl.rollout.generate import Context, Rollout, Schedule, as_context, commit_frame, generate_frames

SHARED = 2**40
"""Takes the place of a window in seeds that all samples share."""

Generators = Callable[[int], list[torch.Generator]]
"""Returns a generator of each sample for a part of its noise, such as a frame, by its number; the same every time."""


@dataclass(frozen=True)
class Plan:
    """Random choices of a step, the same for all samples, for all batches of an accumulation and on all ranks.

    Attributes:
        exit_step: Denoising step whose prediction of the clean frame ends a frame, from 0.
        frames: Number of generated frames.
    """

    exit_step: int
    frames: int


@dataclass
class Generated:
    """A rollout.

    Attributes:
        clip: Its last W frames, which may include context, without gradients: "video" float[B, W, c, h, w], ...
        controls: Controls of these frames.
        last: The last K frames, float[B, K, ...], with gradients if requested.
        again: Generates the last K frames once more, one after another, each with its own graph; None if not requested.
        past: The frames that preceded each frame when it was generated, shaped like ``clip``. None: those of the clip.
        end: Number of frames of the dataset's clip up to the last one.
    """

    clip: Streams
    controls: Controls
    last: Streams
    again: Iterator[Streams] | None
    past: Streams | None
    end: int


@dataclass(frozen=True)
class StudentRollouts:
    """Generate rollouts for training.

    Frames are committed without gradients, so that gradients of a frame reach the weights only through the exit step of
    this frame.

    Attributes:
        network: The student.
        schedule: Its denoising steps.
        frames: Length of the longest rollout.
        last: Number of last frames with gradients, K.
        window: Number of last frames that are returned, at most.
        context: Number of given frames.
    """

    network: WorldTransformer
    schedule: Schedule
    frames: int
    last: int
    window: int
    context: int

    def plan(self, step: int) -> Plan:
        """Draw the exit step, and a length from ``last`` to ``frames``, for a training step."""
        exits, length = torch.rand(2, generator=step_generator(step, SHARED, torch.device("cpu"))).tolist()
        steps, lengths = len(self.schedule.noise_levels), self.frames - self.last + 1
        return Plan(int(exits * steps), self.last + int(length * lengths))

    @property
    def whole(self) -> Plan:
        """Return the plan of the longest rollout with all denoising steps."""
        return Plan(len(self.schedule.noise_levels) - 1, self.frames)

    def __call__(
        self,
        latents: Streams,
        controls: Controls,
        plan: Plan,
        generators: Generators,
        grad: bool = False,
        again: bool = False,
    ) -> Generated:
        """Generate a rollout.

        Args:
            latents: Standardised latents of clips, of which the first ``context`` frames are used.
            controls: Controls of the clips, [B, F, ...] with F of at least ``context + frames``.
            plan: Exit step and length.
            generators: Called with the number of a frame.
            grad: Whether the last frames carry gradients, all in one graph.
            again: Whether they can be generated once more, with gradients.
        """
        schedule, exits = self.schedule.until(plan.exit_step), [plan.exit_step]
        noise = self._noise(latents, schedule, generators)
        begin, end = self.context, self.context + plan.frames
        before, own = controls.at(slice(begin, end - self.last)), controls.at(slice(end - self.last, end))
        shown = [{name: x[:, t : t + 1] for name, x in latents.items()} for t in range(begin)]
        rollout = self._begin(shown, controls, schedule, noise)
        shown += generate_frames(self.network, rollout, before, schedule, noise)
        start = deepcopy(rollout) if again else None
        last = list(generate_frames(self.network, rollout, own, schedule, noise, exits if grad else ()))
        seen = (shown + last)[-self.window :]
        return Generated(
            _joined([{name: x.detach() for name, x in frame.items()} for frame in seen]),
            controls.at(slice(end - len(seen), end)),
            _joined(last),
            generate_frames(self.network, start, own, schedule, noise, exits) if start else None,
            past=None,
            end=end,
        )

    def after_data(
        self, latents: Streams, controls: Controls, plan: Plan, generators: Generators, grad: bool = False
    ) -> Generated:
        """Predict frames after the dataset's frames instead of the student's own, in one pass.

        Each frame is shown with noise of a random level of the schedule (CausVid, Yin et al. 2025, algorithm 2), and
        all W frames are predicted, the last K of them with gradients if requested.

        Args:
            latents: See above; all frames are used.
            controls: See above.
            plan: Its length determines the last frame.
            generators: See above.
            grad: Whether the last frames carry gradients.
        """
        end = self.context + plan.frames
        begin = max(0, end - self.window)
        true, own = {name: x[:, begin:end] for name, x in latents.items()}, controls.at(slice(begin, end))
        steps = torch.tensor(self.schedule.noise_levels, device=own.buttons.device)

        def levels(uniform: torch.Tensor) -> torch.Tensor:
            return steps[(uniform * len(steps)).long()]

        noise = self.schedule.context_noise
        shown = present(true, own, end - begin, True, noise, levels, generators(begin))
        with torch.set_grad_enabled(grad):
            (velocity,) = shown.velocities(self.network)
        predicted = shown.to_clean(velocity)
        last = {name: x[:, -self.last :] for name, x in predicted.items()}
        clip = {name: x.detach() for name, x in predicted.items()}
        return Generated(clip, own, last, None, past=true, end=end)

    def bytes_per_frame(self, latents: Streams, controls: Controls, generators: Generators) -> int:
        """Measure the memory of the activations of a frame with gradients; arguments as of a call."""
        schedule, first = self.schedule.until(0), controls.at(slice(1))
        noise = self._noise(latents, schedule, generators)

        def generate() -> list[Streams]:
            rollout = self._begin([], controls, schedule, noise)
            return list(generate_frames(self.network, rollout, first, schedule, noise, [0]))

        return saved_bytes(generate)

    def _begin(
        self, frames: list[Streams], controls: Controls, schedule: Schedule, noise: Callable[[int], list[Streams]]
    ) -> Rollout:
        """Commit the frames of the context, to a cache in the precision of training."""
        device, dtype = controls.buttons.device, placement(self.network).dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        cache = self.network.new_cache(len(controls.buttons), schedule.copies, dtype, device)
        for t, frame in enumerate(frames):
            own, level = controls.at(slice(t, t + 1)), schedule.context_noise
            context = as_context(frame, own, noise(t)[-1], level) if level else Context(frame, own)
            commit_frame(self.network, cache, context, level)
        return Rollout(cache)

    def _noise(self, latents: Streams, schedule: Schedule, generators: Generators) -> Callable[[int], list[Streams]]:
        """Return a function that draws the noise of a frame, as `generate_frames` takes it."""
        frame = {name: x[:, :1] for name, x in latents.items()}
        draws = schedule.draws + bool(schedule.context_noise)

        def drawn(number: int) -> list[Streams]:
            own = generators(number)
            return [draw(own, frame) for _ in range(draws)]

        return drawn


def _joined(frames: list[Streams]) -> Streams:
    """Concatenate frames in time."""
    return {name: torch.cat([frame[name] for frame in frames], 1) for name in frames[0]}
