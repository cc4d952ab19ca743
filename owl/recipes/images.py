"""Images and other modalities of a batch."""

import torch
from torch import Tensor

from owl.errors import OwlError
from owl.pixels import to_float


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
        found = "missing" if rgb is None else f"{rgb.dtype}{list(rgb.shape)}"
        raise OwlError(
            "recipe.dataset",
            f"rgb of a batch is {found}, expected uint8[B, T, 3, H, W]; set data.init_args.modalities to "
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
        held = "missing" if found is None else f"{found.dtype}{list(found.shape)}"
        raise OwlError(
            "recipe.dataset",
            f"{name} of a batch is {held}, expected float[B, T, {channels}, h, w]; add {name} to "
            "data.init_args.modalities, or change your data module",
        )
    return found.flatten(0, 1)
