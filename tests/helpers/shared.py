"""An untrained shared world: a world model that is not blank, a decoder, and scenes."""

from pathlib import Path

import torch

from owl import models
from owl.data.shards import DatasetInfo
from owl.latents import load_latent_stats
from owl.models.sampling import Sampling
from owl.rollout.shared import SharedWorld
from tests.helpers.decoders import LatentDecoder
from tests.helpers.latents import FINGERPRINT, LATENT, lively, make_latents


def make_shared(folder: Path) -> Path:
    """Write it; its pictures are 32x48."""
    world = SharedWorld(folder, ("tiny",))
    make_latents(world.scenes, lengths=(8, 8, 8, 40))
    network, decoder = lively(), LatentDecoder(LATENT)
    load_latent_stats(network, DatasetInfo.load(world.scenes).modalities, world.scenes)
    with torch.no_grad():
        decoder.get_buffer("latent_encoder").copy_(torch.tensor(list(bytes.fromhex(FINGERPRINT))))
        decoder.up.weight.copy_(torch.randn(decoder.up.weight.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    network.sampling = Sampling(steps=2)
    models.save(network, folder)
    models.save(decoder, world.decoder("tiny"))
    world.save()
    return folder
