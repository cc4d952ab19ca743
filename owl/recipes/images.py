"""Images of a batch."""

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
