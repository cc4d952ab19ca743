"""End to end: the flow's loss teaches the encoder, the decoder uses its latent, and one checkpoint holds both."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from owl import models
from owl.latents import encoder_of, load_encoder
from owl.losses.lpips import LPIPS
from owl.models.diffusion_autoencoder import DiffusionAutoencoder
from owl.models.diffusion_decoder import DiTDecoder
from owl.nn.frozen import trained
from owl.recipes.diffusion_decoder import DiffusionDecoder, Weights
from owl.recipes.images import images
from tests.helpers.autoencoders import save_autoencoder, tiny_decoder
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import owl_here, write_config

TINY = {"patch": [8, 8], "width": 32, "depth": 1, "heads": 2, "mlp_ratio": 2.0}
FLOW = Weights(flow=1.0, lpips=0.0)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusion_autoencoder")
    make_dataset(folder / "footage", 3, 12, (32, 48), ["rgb"])
    save_autoencoder(folder / "autoencoder")
    network = {"class_path": "owl.models.diffusion_decoder.DiTDecoder", "init_args": TINY}
    options = {"train_encoder": True, "noise_sync": 0.5, "weights": {"lpips": 0.0}}
    options |= {"network": network, "warmup_steps": 1, "final_lr": 1.0}
    class_path = "owl.recipes.diffusion_decoder.DiffusionDecoder"
    experiment = tiny_decoder(folder / "footage", "autoencoder", class_path, **options)
    experiment["trainer"]["callbacks"] = None
    experiment["data"]["init_args"]["validation_windows"] = 3
    write_config(folder / "tiny.yaml", experiment)
    return folder


def recipe(lab: Path, **options: Any) -> DiffusionDecoder:
    def network(*geometry: Any) -> DiTDecoder:
        return DiTDecoder(*geometry, **TINY)

    torch.manual_seed(0)
    made = DiffusionDecoder(
        str(lab / "autoencoder"), network, train_encoder=True, lpips=LPIPS(), weights=FLOW, **options
    )
    made.log = made.log_dict = lambda *arguments, **keywords: None
    return made


def batch(size: int = 4, frames: int = 1) -> dict[str, Tensor]:
    """Frames that differ in brightness and detail, and no latents."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(size * frames, 3, 4, 6, generator=generator)
    rgb = torch.nn.functional.interpolate(coarse, (32, 48)).mul(255).byte().unflatten(0, (size, frames))
    return {"rgb": rgb, "window": torch.arange(size)}


def test_the_loss_teaches_the_encoder_and_the_decoder_uses_its_latent(lab: Path) -> None:
    made, data = recipe(lab), batch()
    optimizer = torch.optim.AdamW(trained(made.network).values(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        made.training_step(data, 0).backward()
        optimizer.step()
    assert all(p.grad.norm() > 0 for p in trained(made.network.encoder).values())
    with torch.no_grad():
        latent, draws = made.latents(data), made.draw(data)
        right, wrong = (
            made.losses(images(data), z, replace(draws, known=torch.ones(4, dtype=torch.bool)))[0]["flow"]
            for z in (latent, latent.roll(1, 0))
        )
    assert wrong > 1.2 * right


def test_every_latent_is_normalised(lab: Path) -> None:
    made = recipe(lab)
    mean = made.network.encode(images(batch()) * 0.1 + 0.5).mean
    torch.testing.assert_close(mean.mean((1, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(mean.var((1, 2, 3), correction=0), torch.ones(4), atol=1e-3, rtol=0)


def test_noise_of_the_latent_and_of_the_target_are_synchronised(lab: Path) -> None:
    made, data = recipe(lab, noise_sync=0.3), batch(300, 2)
    draws, latent = made.draw(data), torch.zeros(600, 4, 4, 6)
    noisy, synchronised = made.synchronise(data, latent, draws)
    level = noisy.flatten(1).std(1)  # of noise of level s that was added to zeros
    chosen = level > 0
    assert chosen.float().mean().item() == pytest.approx(0.3, abs=0.06)
    assert torch.equal(synchronised.noise_level[~chosen], draws.noise_level[~chosen])
    least = (synchronised.noise_level - draws.noise_level) / (1 - draws.noise_level)  # s, by t' = s + (1 - s) t
    torch.testing.assert_close(least[chosen], level[chosen], atol=0.3, rtol=0)
    assert torch.corrcoef(torch.stack([least, level]))[0, 1] > 0.98
    assert least[chosen].mean().item() == pytest.approx(0.5, abs=0.07)
    assert recipe(lab).synchronise(data, latent, draws) == (latent, draws)
    shortcuts = replace(draws, bootstrapped=torch.arange(600))
    assert torch.equal(made.synchronise(data, latent, shortcuts)[1].noise_level, draws.noise_level)


def test_one_checkpoint_encodes_and_decodes_and_a_resumed_run_equals_the_uninterrupted_one(lab: Path) -> None:
    for name, steps, *options in (("whole", "4"), ("resumed", "3"), ("resumed", "4", "--ckpt_path", "last")):
        limit = ("--name", name, "--trainer.max_steps", steps)
        assert owl_here("fit", "--config", "tiny.yaml", *limit, *options, cwd=lab) == 0
    checkpoints = [lab / "runs" / name / "checkpoints" / "last.ckpt" for name in ("whole", "resumed")]
    whole, resumed = (torch.load(checkpoint, weights_only=True) for checkpoint in checkpoints)
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(resumed[key], whole[key], rtol=0, atol=0)
    network = models.load(checkpoints[0])
    assert isinstance(network, DiffusionAutoencoder)
    encoder = load_encoder(str(checkpoints[0]))
    assert encoder.fingerprint == encoder_of(network) == models.fingerprint(network.encoder)
    assert encoder.distilled is None
    image = images(batch())
    assert network.decode(network.encode(image).mean).shape == image.shape


def test_a_residual_needs_the_autoencoders_own_latents(lab: Path) -> None:
    with refused("recipe.arguments", "residual"):
        recipe(lab, residual=True)
