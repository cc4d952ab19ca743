"""Samplers of rectified flow as plain functions: how to get from one noise level to the next."""

from torch import Tensor


def noise_levels(steps: int, shift: float = 1.0) -> list[float]:
    """Levels of the steps of a frame, for ``Engine(levels=...)``: from 1, evenly spaced, then shifted towards noise.

    Args:
        steps: Evaluations of the network per frame.
        shift: s in s u / (1 + (s - 1) u) (Stable Diffusion 3, Esser et al. 2024, section 5.3.2); 1 keeps them even.
    """
    even = [1 - step / steps for step in range(steps)]
    return [shift * u / (1 + (shift - 1) * u) for u in even]


def euler(x: Tensor, velocity: Tensor, noise: Tensor, level: float, following: float) -> Tensor:
    """Follow the flow along its tangent: x at level t -> x at the following level. ``noise`` is not used."""
    return x + (following - level) * velocity


def consistency(x: Tensor, velocity: Tensor, noise: Tensor, level: float, following: float) -> Tensor:
    """Jump to the predicted x0 and add fresh noise of the following level, as few-step students are trained to."""
    clean = x - level * velocity
    return (1 - following) * clean + following * noise
