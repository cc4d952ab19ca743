"""What checkpoints store of the arguments of recipes that are built in Python."""

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader

from owl import models
from owl.callbacks.report import Report
from owl.data.datamodule import ShardDataModule
from owl.models.discriminators import ResNetDiscriminator
from owl.models.image_autoencoder import ImageAutoencoder
from owl.recipes.gan_decoder import GANDecoder
from owl.recipes.image_vae import ImageVAE, Weights
from owl.recipes.world_model import WorldModel
from tests.helpers.autoencoders import save_autoencoder
from tests.helpers.latents import draw, lively, make_latents
from tests.helpers.tiny import quiet_trainer


def world_model(folder: Path) -> tuple[LightningModule, Any]:
    data = ShardDataModule(
        str(make_latents(folder / "data")), ["latent", "controls"], length=5, batch_size=2, num_workers=0
    )
    return WorldModel(lively(), "diffusion", optimizer=lambda parameters: SGD(parameters, 1e-3)), data


def image_vae(folder: Path) -> tuple[LightningModule, Any]:
    network = ImageAutoencoder(3, (32, 48), (4, 6), 4, [16, 16, 16], [1, 1, 1])
    images = torch.randint(256, (2, 2, 1, 3, 32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = DataLoader([{"rgb": image} for image in images], batch_size=None)  # type: ignore[arg-type]
    return ImageVAE(network, Weights(lpips=0.0, kl=1e-3), warmup_steps=7), data


def outputs(network: Any) -> Tensor:
    with torch.no_grad():
        if isinstance(network, ImageAutoencoder):
            image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
            return network(image, sample=False)[0]
        return network(*draw(network, 4))["video"]


@pytest.mark.parametrize("build", [world_model, image_vae], ids=lambda build: build.__name__)
def test_checkpoints_of_recipes_built_in_python_load_like_those_of_the_command_line(build: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe, data = build(tmp_path)
        trainer = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0, callbacks=[Report()])
        trainer.fit(recipe, data)
    assert not [str(warning.message) for warning in caught if "hyperparameters" in str(warning.message)]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert "optimizer" not in stored
    assert stored["warmup_steps"] == recipe.warmup_steps
    recipe.eval()
    assert torch.equal(outputs(models.load(tmp_path / "a.ckpt")), outputs(recipe.network))
    again = type(recipe).load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True).eval()
    assert torch.equal(outputs(again.network), outputs(recipe.network))
    assert again.weights == recipe.weights
    assert again.hparams == recipe.hparams


def test_arguments_without_a_plain_form_are_left_out(tmp_path: Path) -> None:
    discriminator = ResNetDiscriminator(widths=[16, 16], blocks=[1, 1], group_size=8)
    recipe = GANDecoder(save_autoencoder(tmp_path), discriminator, beta2=(0.9, 0.99))  # type: ignore[arg-type]  # a Path
    file = io.BytesIO()
    torch.save(dict(recipe.hparams), file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    assert stored["autoencoder"] == str(tmp_path)
    assert stored["discriminator"] == models.describe(discriminator)
    assert stored["beta2"] == [0.9, 0.99]
    assert stored["network"] is None
    assert not {"optimizer", "discriminator_optimizer"} & stored.keys()
