"""Random numbers that belong to a window of the dataset, so that they do not depend on the number of processes."""

import torch
from torch import Tensor

from owl.errors import OwlError
from owl.seeds import derived_seed, run_seed

MEASURED = 2**41
"""Takes the place of a step in the seeds of validation."""


def windows(batch: dict[str, Tensor]) -> list[int]:
    """Return the number of each window of a batch, from which a recipe draws the window's noise.

    Args:
        batch: ``window``: int64[B] on the CPU, where reading it does not synchronize.

    Raises:
        OwlError: The batch has no numbers.
    """
    if "window" not in batch:
        raise OwlError(
            "recipe.dataset",
            "samples hold no window, int64[B], from which the recipe draws each clip's noise; number the windows of "
            "your dataset and add their numbers",
        )
    numbers: list[int] = batch["window"].tolist()
    return numbers


def step_generator(step: int, window: int, device: torch.device, *parts: int) -> torch.Generator:
    """Return a generator for a step and a window of the dataset, or for a part of it, such as a frame.

    It is on the device, so that sampling does not use the CPU; the numbers are equal on all devices of one kind.
    """
    return torch.Generator(device).manual_seed(derived_seed(step, window, run_seed(), *parts))
