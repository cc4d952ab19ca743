"""How a world model's frames are sampled."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

from owl.errors import OwlError

Sampler = Literal["adams_bashforth", "euler", "consistency"]


@dataclass(frozen=True)
class Sampling:
    """How a world model generates a frame in rollouts and in play.

    Attributes:
        steps: Evaluations of the network per frame.
        shift: Shift of their noise levels towards noise, see `owl.flow_matching.noise_levels`.
        sampler: "adams_bashforth" (of second order; a single step is Euler's), "euler", or "consistency" for few-step
            students.
        context_noise: Noise level at which frames become context, in [0, 1); the training's context noise covers it.
        guidance: Weight of classifier-free guidance on the controls; 1 is none.

    Raises:
        OwlError: A value is out of range.
    """

    steps: int = 4
    shift: float = 1.0
    sampler: Sampler = "adams_bashforth"
    context_noise: float = 0.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        samplers = get_args(Sampler)
        for name, valid, expected in (
            ("steps", 1 <= self.steps <= 128, "1 to 128"),
            ("shift", 0.01 <= self.shift <= 100, "0.01 to 100"),
            ("sampler", self.sampler in samplers, f"one of {', '.join(samplers)}"),
            ("context_noise", 0 <= self.context_noise < 1, "at least 0 and below 1"),
            ("guidance", 0 <= self.guidance <= 20, "0 to 20"),
        ):
            if not valid:
                raise OwlError("sampling.settings", f"{name} is {getattr(self, name)}, expected {expected}; correct it")

    def override(self, **given: Any) -> Self:
        """Return a copy with the given values of attributes, except those that are None."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})
