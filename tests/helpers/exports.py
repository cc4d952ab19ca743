"""A world model with sound and all that it needs, tiny and without training: its weights are random."""

from pathlib import Path

import torch

from owl import models
from owl.data.shards import DatasetInfo
from owl.latents import in_windows, load_latent_stats
from owl.models.audio_autoencoder import AudioAutoencoder
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.world_model import Stream, WorldTransformer
from tests.helpers.shards import AXES, BUTTONS, make_dataset
from tests.helpers.tiny import owl_here

STRIDE = 2
PICTURES, SOUNDS, LATENTS, WORLD = "pictures", "sounds", "latents", "world"
SIZE = (32, 48)
SAMPLES = STRIDE * 1260


def make_exports(folder: Path) -> Path:
    """Write exports of both autoencoders, a dataset of latents with its footage, and an export of the world model."""
    torch.manual_seed(0)
    make_dataset(folder / "footage", episodes=3, frames=20, size=SIZE, modalities=("rgb", "audio", "controls"))
    models.save(ImageAutoencoder(3, SIZE, (4, 6), 4, [8, 16, 16], [1, 1, 1]), folder / PICTURES)
    models.save(AudioAutoencoder(2, 44_100, [15, 42], [4, 4, 4], 3, causal=True), folder / SOUNDS)
    encode = ("data", "encode", PICTURES, SOUNDS, "footage", LATENTS, "--name", "latent,audio_latent")
    assert owl_here(*encode, "--keep", "controls,rgb,audio", cwd=folder) == 0
    models.save(make_network(folder / LATENTS, seed=0), folder / WORLD)
    return folder


def make_network(latents: Path, seed: int) -> WorldTransformer:
    """Return a world model of pictures and sound whose frames depend on everything."""
    streams = {
        "video": Stream((4, 4, 6), patch=2, modality="latent"),
        "audio": Stream((2 * STRIDE, 3), sinks=1, modality="audio_latent"),
    }
    network = WorldTransformer(streams, BUTTONS, AXES, width=32, depth=1, heads=2, window=4)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(0.1 * torch.randn(weights.shape, generator=random))  # a trained one has no zeros
    load_latent_stats(network, in_windows(DatasetInfo.load(latents).modalities, STRIDE), str(latents))
    return network
