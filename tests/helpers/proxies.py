"""Tiny autoencoders of diffusers with random weights, saved as that package saves them."""

from pathlib import Path
from typing import Any

import torch

TINY: dict[str, dict[str, Any]] = {
    "AutoencoderTiny": {
        "encoder_block_out_channels": (4, 4),
        "decoder_block_out_channels": (4, 4),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
        "latent_channels": 4,
    },
    "AutoencoderKL": {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 4),
        "norm_num_groups": 2,
        "latent_channels": 4,
        "scaling_factor": 0.3611,  # those of FLUX.1
        "shift_factor": 0.1159,
    },
    "AutoencoderDC": {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), ()),
        "decoder_qkv_multiscales": ((), ()),
        "latent_channels": 4,
        "scaling_factor": 0.5,
    },
}
"""Arguments of an autoencoder of each class with 4 latent channels at half the size."""


def save_proxy(folder: Path, name: str = "AutoencoderTiny", **changes: Any) -> Any:
    """Write an autoencoder to a folder, and return it."""
    import diffusers

    torch.manual_seed(0)
    autoencoder = getattr(diffusers, name)(**TINY[name] | changes).eval()
    autoencoder.save_pretrained(folder)
    return autoencoder
