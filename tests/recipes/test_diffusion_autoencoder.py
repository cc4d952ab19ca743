"""End to end: every loss teaches the encoder, the decoder uses its latent, and one checkpoint holds both."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from owl import models
from owl.latents import encoder_of, load_encoder
from owl.losses.lpips import LPIPS
from owl.models.diffusion_autoencoder import DiffusionAutoencoder
from owl.models.diffusion_decoder import DiTDecoder
from owl.models.discriminators import PatchDiscriminator
from owl.nn.frozen import trained
from owl.recipes.diffusion_decoder import DiffusionDecoder, Weights
from owl.recipes.images import images
from tests.helpers.autoencoders import drawn, save_autoencoder, tiny_decoder
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import owl_here, quiet_trainer, write_config

TINY = {"patch": [8, 8], "width": 32, "depth": 1, "heads": 2, "mlp_ratio": 2.0}
FLOW = Weights(flow=1.0, lpips=0.0)
PERCEPTUAL = LPIPS()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusion_autoencoder")
    make_dataset(folder / "footage", 3, 12, (32, 48), ["rgb"])
    save_autoencoder(folder / "autoencoder")
    network = {"class_path": "owl.models.diffusion_decoder.DiTDecoder", "init_args": TINY}
    discriminator = {"class_path": "owl.models.discriminators.PatchDiscriminator"}
    discriminator["init_args"] = {"width": 8, "layers": 2}
    options = {"train_encoder": True, "noise_sync": 0.5, "weights": {"lpips": 0.0, "adversarial": 0.5}}
    options |= {"discriminator": discriminator, "adversarial_ramp": 2, "penalty_every": 2}
    options |= {"network": network, "warmup_steps": 1, "final_lr": 1.0}
    class_path = "owl.recipes.diffusion_decoder.DiffusionDecoder"
    experiment = tiny_decoder(folder / "footage", "autoencoder", class_path, **options)
    experiment["trainer"]["callbacks"] = None
    experiment["data"]["init_args"]["validation_windows"] = 3
    write_config(folder / "tiny.yaml", experiment)
    return folder


def recipe(lab: Path, weights: Weights = FLOW, shortcut: bool = False, **options: Any) -> DiffusionDecoder:
    def network(*geometry: Any) -> DiTDecoder:
        return DiTDecoder(*geometry, **TINY, shortcut=shortcut)

    torch.manual_seed(0)
    made = DiffusionDecoder(
        str(lab / "autoencoder"), network, train_encoder=True, lpips=PERCEPTUAL, weights=weights, **options
    )
    made.log = made.log_dict = lambda *arguments, **keywords: None
    return made


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.1)


def small(channels: int) -> PatchDiscriminator:
    return PatchDiscriminator(channels, width=8, layers=2)


def step(lab: Path, steps: int = 1, clip: float | None = None, **options: Any) -> tuple[DiffusionDecoder, ...]:
    """A recipe whose layers all do something, before and after steps on the same frames."""
    itself = "discriminator" in options  # it clips, not the trainer
    schedule = {"warmup_steps": 0, "final_lr": 1.0} | ({"clip": clip} if itself else {})
    made = recipe(lab, optimizer=sgd, discriminator_optimizer=sgd, **schedule, **options)
    torch.manual_seed(1)  # the discriminator has drawn its weights
    with torch.no_grad():
        for parameter in trained(made.network).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = copy.deepcopy(made)
    trainer = quiet_trainer(lab, max_steps=steps, gradient_clip_val=None if itself else clip)
    trainer.fit(made, DataLoader([batch()] * steps, batch_size=None))
    return before, made


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
        latent, draws = made.latents(data), drawn(made, data)
        right, wrong = (
            made.losses(images(data), z, replace(draws, known=torch.ones(4, dtype=torch.bool)))[0]["flow"]
            for z in (latent, latent.roll(1, 0))
        )
    assert wrong > 1.2 * right


def test_encoder_decoder_and_discriminator_learn_what_plain_autograd_says(lab: Path) -> None:
    weights = Weights(flow=1.0, lpips=0.0, adversarial=4.0)
    adversarial = {"discriminator": small, "adversarial_ramp": 2, "gamma": 3.0, "penalty_every": 1}
    before, after = step(lab, weights=weights, **adversarial)
    network, judge = before.network, before.discriminator
    mean, std = (moment[:, None, None] for moment in (after.network.target_mean, after.network.target_std))
    draws, image = drawn(before, batch()), images(batch())
    t, clean = draws.noise_level[:, None, None, None], (image - mean) / std
    noisy = (1 - t) * clean + t * draws.noise
    velocity = network(noisy, draws.noise_level, network.encode(image).mean)
    estimate, level = noisy - t * velocity, t.expand(-1, 1, *image.shape[2:])
    true, false = (torch.cat([x0, noisy, level], 1) for x0 in (clean, estimate))
    flow, fooling = (velocity - draws.noise + clean).square().mean(), F.softplus(judge(true) - judge(false)).mean()
    own = trained(network)
    assert all(g.any() for g in torch.autograd.grad(fooling, trained(network.encoder).values(), retain_graph=True))
    slopes = torch.autograd.grad(flow + 2 * fooling, own.values())  # half of the ramp
    for (name, old), slope in zip(own.items(), slopes, strict=True):
        torch.testing.assert_close(trained(after.network)[name], old - 0.1 * slope, rtol=1e-3, atol=1e-6)
    true, false = true.detach().requires_grad_(), false.detach().requires_grad_()
    real, fake = judge(true), judge(false)
    penalties = torch.autograd.grad(real.sum() + fake.sum(), (true, false), create_graph=True)
    penalty = sum(slope.square().sum() / real.numel() for slope in penalties)
    slopes = torch.autograd.grad(F.softplus(fake - real).mean() + 1.5 * penalty, judge.parameters())
    for old, new, slope in zip(judge.parameters(), after.discriminator.parameters(), slopes, strict=True):
        torch.testing.assert_close(new, old - 0.1 * slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "unheard", [{"adversarial_ramp": 10**12}, {"adversarial_ramp": 0, "shortcut": True, "bootstrap": 1.0}]
)
def test_a_discriminator_that_has_no_weight_changes_nothing(lab: Path, unheard: dict[str, Any]) -> None:
    """As all frames learn shortcuts, none has an estimate of x0."""
    weights = Weights(flow=1.0, lpips=0.0, adversarial=1.0)
    _, plain = step(lab, steps=2, clip=0.1, **unheard)
    _, judged = step(lab, steps=2, weights=weights, discriminator=small, clip=0.1, **unheard)
    for name, weight in trained(plain.network).items():
        torch.testing.assert_close(trained(judged.network)[name], weight)


def test_every_latent_is_normalised(lab: Path) -> None:
    made = recipe(lab)
    mean = made.network.encode(images(batch()) * 0.1 + 0.5).mean
    torch.testing.assert_close(mean.mean((1, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(mean.var((1, 2, 3), correction=0), torch.ones(4), atol=1e-3, rtol=0)


def test_noise_of_the_latent_and_of_the_target_are_synchronised(lab: Path) -> None:
    made, data = recipe(lab, noise_sync=0.3), batch(300, 2)
    draws, latent = drawn(made, data), torch.zeros(600, 4, 4, 6)
    noisy, synchronised = made.chances.synchronise(data, latent, draws, 0)
    level = noisy.flatten(1).std(1)  # of noise of level s that was added to zeros
    chosen = level > 0
    assert chosen.float().mean().item() == pytest.approx(0.3, abs=0.06)
    assert torch.equal(synchronised.noise_level[~chosen], draws.noise_level[~chosen])
    least = (synchronised.noise_level - draws.noise_level) / (1 - draws.noise_level)  # s, by t' = s + (1 - s) t
    torch.testing.assert_close(least[chosen], level[chosen], atol=0.3, rtol=0)
    assert torch.corrcoef(torch.stack([least, level]))[0, 1] > 0.98
    assert least[chosen].mean().item() == pytest.approx(0.5, abs=0.07)
    assert recipe(lab).chances.synchronise(data, latent, draws, 0) == (latent, draws)
    shortcuts = replace(draws, bootstrapped=torch.arange(600))
    assert torch.equal(made.chances.synchronise(data, latent, shortcuts, 0)[1].noise_level, draws.noise_level)


def test_one_checkpoint_encodes_and_decodes_and_a_resumed_run_equals_the_uninterrupted_one(lab: Path) -> None:
    for name, steps, *options in (("whole", "4"), ("resumed", "3"), ("resumed", "4", "--ckpt_path", "last")):
        limit = ("--name", name, "--trainer.max_steps", steps)
        assert owl_here("fit", "--config", "tiny.yaml", *limit, *options, cwd=lab) == 0
    checkpoints = [lab / "runs" / name / "checkpoints" / "last.ckpt" for name in ("whole", "resumed")]
    whole, resumed = (torch.load(checkpoint, weights_only=True) for checkpoint in checkpoints)
    for key in ("state_dict", "ema", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(resumed[key], whole[key], rtol=0, atol=0)
    assert len(whole["optimizer_states"]) == 2
    assert {name.split(".")[0] for name in whole["state_dict"]} == {"network", "discriminator"}
    assert {name.split(".")[0] for name in whole["ema"]["raw"]} == {"network"}
    metrics = json.loads((lab / "runs" / "whole" / "metrics.json").read_text())
    measured = {"val/psnr", "val/ssim", "val/lpips_st_alex", "val/fd_efficientnet_lite0"}
    assert {*measured, "train/adversarial", "train/discriminator", "train/r1", "train/logit_gap"} <= metrics.keys()
    network = models.load(checkpoints[0])
    assert isinstance(network, DiffusionAutoencoder)
    encoder = load_encoder(str(checkpoints[0]))
    assert encoder.fingerprint == encoder_of(network) == models.fingerprint(network.encoder)
    assert encoder.distilled is None
    image = images(batch())
    assert network.decode(network.encode(image).mean).shape == image.shape


def test_what_does_not_fit_is_reported(lab: Path) -> None:
    with refused("recipe.arguments", "residual"):
        recipe(lab, residual=True)
    weights = Weights(adversarial=0.5)
    with refused("recipe.arguments", "weights.adversarial is 0.5"):
        recipe(lab, weights)
    with refused("recipe.arguments", "weights.adversarial is 0.0"):
        recipe(lab, discriminator=small)
    for name in ("gamma", "noise"):
        with refused("recipe.arguments", f"{name} is -1.0", f"model.init_args.{name}"):
            recipe(lab, **{name: -1.0})
    made = recipe(lab, weights, discriminator=small, gamma=2.0)
    made._device_mesh = {"data_parallel": None}  # type: ignore[assignment]
    with refused("trainer.strategy", "gamma is 2.0", "ddp"):
        made.configure_model()
