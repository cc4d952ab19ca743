"""Images and other modalities of a batch."""

import torch
from torch import Tensor

from owl.errors import OwlError
from owl.pixels import to_float


def form(tensor: Tensor | None) -> str:
    """Describe a tensor of a batch, such as ``torch.float32[2, 3]``, for the messages of errors."""
    return "missing" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"


def images(batch: dict[str, Tensor]) -> Tensor:
    """Flatten the frames of a batch, in the memory format of convolutions (channels last).

    Args:
        batch: ``rgb``: uint8[B, T, 3, H, W].

    Returns:
        float[B * T, 3, H, W] in [-1, 1].

    Raises:
        OwlError: The batch has no pictures, or in another form.
    """
    rgb = batch.get("rgb")
    if rgb is None or rgb.ndim != 5 or rgb.shape[2] != 3 or rgb.dtype != torch.uint8:
        raise OwlError(
            "recipe.dataset",
            f"rgb of a batch is {form(rgb)}, expected uint8[B, T, 3, H, W]; set data.init_args.modalities to "
            "[rgb], or change your data module",
        )
    return to_float(rgb.flatten(0, 1).contiguous(memory_format=torch.channels_last))


def of_modality(batch: dict[str, Tensor], name: str, channels: int) -> Tensor:
    """Flatten the frames of another modality of pictures of a batch, such as depth or flow.

    Args:
        batch: The modality by its name: float[B, T, channels, h, w].
        name: Its name.
        channels: Its channels.

    Returns:
        float[B * T, channels, h, w], in the same order as `images`.

    Raises:
        OwlError: The batch lacks the modality, or has it in another form.
    """
    found = batch.get(name)
    if found is None or found.ndim != 5 or found.shape[2] != channels or not found.is_floating_point():
        raise OwlError(
            "recipe.dataset",
            f"{name} of a batch is {form(found)}, expected float[B, T, {channels}, h, w]; add {name} to "
            "data.init_args.modalities, or change your data module",
        )
    return found.flatten(0, 1)
