"""World models from files; tests/recipes/test_teachers.py and tests/commands/test_rollout.py load checkpoints."""

from pathlib import Path

import torch

from owl import models
from owl.models.image_autoencoder import ImageAutoencoder
from owl.rollout.loading import load_world_model, parts_of, trained_stride
from tests.helpers.errors import refused
from tests.helpers.latents import lively


def test_an_export_has_no_content_and_stride_one(tmp_path: Path) -> None:
    network = lively()
    models.save(network, tmp_path)
    loaded, content = load_world_model(tmp_path)
    assert not loaded.training
    assert all(torch.equal(found, network.state_dict()[name]) for name, found in loaded.state_dict().items())
    assert content is None
    assert parts_of(tmp_path, content).stride == trained_stride({"owl": {"config": {}}}) == 1


def test_another_network_is_reported(tmp_path: Path) -> None:
    models.save(ImageAutoencoder(size=(16, 24), latent_size=(4, 6), widths=[8, 16], blocks=[1, 1]), tmp_path)
    with refused("network.kind", str(tmp_path), "ImageAutoencoder", "a world model"):
        load_world_model(tmp_path)
