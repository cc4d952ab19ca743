"""A tiny network that predicts depth, as transformers saves it."""

from pathlib import Path

import torch


def save_depth_network(folder: str | Path, seed: int = 0) -> Path:
    """Save a Depth Anything of random weights, whose depth varies, with its image processor."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=28,
        patch_size=14,
        out_features=["stage1", "stage2"],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        patch_size=14,
        neck_hidden_sizes=[8, 8],
        reassemble_factors=[4, 2],
        fusion_hidden_size=16,
        head_hidden_size=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DepthAnythingForDepthEstimation(config)
        with torch.no_grad():
            for parameter in network.parameters():  # else the output would be all but constant
                parameter += 0.1 * torch.randn_like(parameter)
            network.head.conv3.bias.fill_(1.0)  # above the final ReLU
    network.save_pretrained(folder)
    size = {"height": 28, "width": 42}
    DPTImageProcessor(size=size, keep_aspect_ratio=False, ensure_multiple_of=14).save_pretrained(folder)
    return Path(folder)
