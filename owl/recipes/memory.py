"""Whether the activations of a training step fit into memory, found before the step."""

from collections.abc import Callable

import psutil
import torch
from torch import Tensor

from owl.errors import OwlError


def saved_bytes(function: Callable[[], object]) -> int:
    """Return the memory that autograd keeps for the backward pass of a function's results.

    The function is run twice, and only what the second run adds is counted: neither weights nor their copies in the
    precision of autocast.
    """
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)  # which no other tensor's storage can then have
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        first = function()
        before = set(kept)
        second = function()
    del first, second
    return sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in before)


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device for this process."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(psutil.virtual_memory().available)


def check_rollout(per_frame: int, frames: int, device: torch.device) -> None:
    """Check that the activations of a rollout's frames with gradients fit into memory.

    Args:
        per_frame: Bytes of a frame.
        frames: Frames whose activations are kept at the same time.
        device: Where they are kept.

    Raises:
        OwlError: They do not.
    """
    needed, free = per_frame * frames, free_bytes(device)
    if needed > free:
        remedy = "set two_passes to true, or " if frames > 1 else ""
        raise OwlError(
            "rollout.memory",
            f"the activations of {frames} frames with gradients need {needed / 2**30:.3g} GiB, {device} has "
            f"{free / 2**30:.3g} GiB free; {remedy}set checkpoint to true, or lower gradient_frames or the batch size",
        )
