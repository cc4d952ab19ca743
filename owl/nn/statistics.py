"""Buffers that identify the latents a network was trained on."""

import torch
from torch import nn


def register_latent(module: nn.Module, name: str, channels: int) -> None:
    """Add the buffers of one latent to a network: ``<name>_mean``, ``<name>_std`` and ``<name>_encoder``.

    `owl.latents.load_latent_stats` fills them from the description of a dataset. Checkpoints and exports store them.

    Args:
        module: The network.
        name: Name of its input.
        channels: Channels of the latent.
    """
    module.register_buffer(f"{name}_mean", torch.zeros(channels))
    module.register_buffer(f"{name}_std", torch.ones(channels))
    module.register_buffer(f"{name}_encoder", torch.zeros(8, dtype=torch.uint8))
