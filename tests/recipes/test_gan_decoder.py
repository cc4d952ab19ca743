"""The recipe: both losses against plain autograd, what is trained, measured and exported, what is refused."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from owl import models
from owl.latents import encoder_of
from owl.losses.adversarial import annealed
from owl.losses.temporal import temporal
from owl.models.discriminators import Discriminator, PatchDiscriminator, ResNetDiscriminator
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.image_decoder import ImageDecoder
from owl.recipes.gan_decoder import GANDecoder, Weights
from tests.helpers.autoencoders import ENCODER, save_autoencoder, tiny_gan_decoder
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import owl_here, quiet_trainer, write_config

FOOTAGE = {"modalities": ("rgb", "flow"), "length": 2}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gan_decoder")
    make_dataset(folder / "data", frames=8, size=(32, 48), modalities=("rgb", "flow"))
    save_autoencoder(folder / "autoencoder")
    trainer = {"max_steps": 4}
    write_config(folder / "tiny.yaml", tiny_gan_decoder("data", "autoencoder", trainer=trainer, **FOOTAGE))
    return folder


def fit(lab: Path, name: str, *options: str) -> dict[str, float]:
    assert owl_here("fit", "--config", "tiny.yaml", "--name", name, *options, cwd=lab) == 0
    return json.loads((lab / "runs" / name / "metrics.json").read_text())


@pytest.fixture(scope="module")
def plain(lab: Path) -> dict[str, float]:
    return fit(lab, "plain")


def stored(lab: Path, name: str) -> dict[str, Any]:
    return torch.load(lab / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)


class Given(GANDecoder):
    """Trains on latents that nothing describes."""

    def setup(self, stage: str) -> None:
        """Nothing to read."""

    def on_fit_start(self) -> None:
        """Nothing to check."""


def discriminator(frames: int = 1, paired: bool = False, **options: Any) -> Discriminator:
    return ResNetDiscriminator(3, frames, paired, **{"widths": [8, 16], "blocks": [1, 1], "group_size": 8} | options)


def recipe(lab: Path, judge: Discriminator | None = None, **options: Any) -> Given:
    torch.manual_seed(0)
    made = Given(
        str(lab / "autoencoder"),
        judge or discriminator(),
        **{
            "weights": Weights(lpips=0.0, adversarial=0.5),
            "optimizer": lambda p: SGD(p, lr=0.05),
            "discriminator_optimizer": lambda p: SGD(p, lr=0.02),
            "clip": None,
            "warmup_steps": 0,
            "final_lr": 1.0,
        }
        | options,
    )
    with torch.no_grad():
        for parameter in made.discriminator.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # no layer is blank
    return made


def batches(count: int, size: int = 3, frames: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rgb = torch.randint(0, 256, (count, size, frames, 3, 32, 48), generator=generator, dtype=torch.uint8)
    latent = torch.randn(count, size, frames, 4, 4, 6, generator=generator)
    return [{"rgb": a, "latent": b} for a, b in zip(rgb, latent, strict=True)]


def trained(made: Given, data: list[dict[str, Tensor]], folder: Path, *callbacks: Callback) -> Given:
    trainer = quiet_trainer(folder, max_steps=len(data), callbacks=list(callbacks))
    trainer.fit(made, DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    return made


def simulate(made: Given, data: list[dict[str, Tensor]]) -> tuple[nn.Module, nn.Module]:
    """The same training in plain PyTorch, with every loss in one graph; without ramp and annealing of betas."""
    decoder, judge = copy.deepcopy(made.network), copy.deepcopy(made.discriminator)
    for number, batch in enumerate(data):
        true = batch["rgb"].float() / 127.5 - 1
        decoded = decoder.decode(batch["latent"].flatten(0, 1)).unflatten(0, true.shape[:2])
        weight = made.weights.adversarial
        real_side, fake_side = judge.sides(true, decoded)
        for_generator = F.softplus(judge(real_side) - judge(fake_side)).mean()
        l1 = (decoded - true).abs().mean()
        if made.adaptive:
            norms = [torch.autograd.grad(loss, decoded, retain_graph=True)[0].norm() for loss in (l1, for_generator)]
            weight = weight * float(norms[0] / (norms[1] + 1e-4))
        sides = [side.detach().requires_grad_() for side in (real_side, fake_side)]
        real, fake = judge(sides[0]), judge(sides[1])
        for_judge = F.softplus(fake - real).mean()
        if made.gamma and (number + 1) % made.penalty_every == 0:
            gradients = torch.autograd.grad(real.sum() + fake.sum(), sides, create_graph=True)
            patches = real[0].numel()
            penalty = sum(gradient.square().sum() / len(gradient) / patches for gradient in gradients)
            gamma = annealed(made.gamma, made.gamma * made.final_gamma, number / len(data))
            for_judge = for_judge + made.penalty_every * gamma / 2 * penalty
        slopes = torch.autograd.grad(l1 + weight * for_generator, list(decoder.parameters()))
        judge_slopes = torch.autograd.grad(for_judge, list(judge.parameters()))
        with torch.no_grad():
            for network, gradients, rate in ((decoder, slopes, 0.05), (judge, judge_slopes, 0.02)):
                for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                    parameter -= rate * gradient
    return decoder, judge


KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "a penalty at every second step": ({"penalty_every": 2, "gamma": 3.0}, 1),
    "a penalty at every step, adaptive": ({"penalty_every": 1, "gamma": 3.0, "adaptive": True}, 1),
    "patches": ({"judge": PatchDiscriminator(width=4, layers=2), "penalty_every": 1, "gamma": 3.0}, 1),
    "pairs of frames": ({"judge": discriminator(frames=2), "gamma": 0.0}, 3),
    "both images at once": ({"judge": discriminator(paired=True), "penalty_every": 1}, 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_both_networks_learn_what_plain_autograd_says(lab: Path, tmp_path: Path, kind: str) -> None:
    options, frames = KINDS[kind]
    made = recipe(lab, **copy.deepcopy(options), adversarial_ramp=0)
    data = batches(4, frames=frames)
    decoder, judge = simulate(made, data)
    before = {name: parameter.clone() for name, parameter in made.named_parameters()}
    trained(made, data, tmp_path)
    for found, expected, part in ((made.network, decoder, "network"), (made.discriminator, judge, "discriminator")):
        moved = torch.cat([(p - before[f"{part}.{n}"]).flatten().double() for n, p in found.named_parameters()])
        wanted = torch.cat([(p - before[f"{part}.{n}"]).flatten().double() for n, p in expected.named_parameters()])
        assert wanted.norm() > 1e-3
        assert (moved - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize(
    ("start", "ramp", "weights"),
    [(0, 0, [1, 1, 1]), (0, 4, [0.25, 0.5, 0.75, 1, 1]), (2, 2, [0, 0, 0.5, 1, 1]), (2, 0, [0, 0, 1, 1])],
)
def test_the_adversarial_term_is_ramped(lab: Path, start: int, ramp: int, weights: list[float]) -> None:
    made = recipe(lab, adversarial_start=start, adversarial_ramp=ramp)
    assert [made.adversarial_weight(step) for step in range(len(weights))] == [0.5 * weight for weight in weights]


def test_the_discriminator_learns_from_the_first_step_and_the_decoder_from_reconstruction_alone(
    lab: Path, tmp_path: Path
) -> None:
    ramped = recipe(lab, adversarial_start=3)
    alone = recipe(lab, adversarial_start=3, weights=Weights(lpips=0.0, adversarial=0.0))
    before = copy.deepcopy(ramped.discriminator.state_dict())
    for made in (ramped, alone):
        trained(made, batches(3), tmp_path)
    for a, b in zip(ramped.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all((value != before[name]).any() for name, value in ramped.discriminator.state_dict().items())


def test_betas_are_annealed_over_the_whole_training(lab: Path, tmp_path: Path) -> None:
    seen = []

    class Note(Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            seen.append([group["betas"] for optimizer in trainer.optimizers for group in optimizer.param_groups])

    def adam(parameters: Any) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, betas=(0.1, 0.5))

    trained(recipe(lab, beta2=(0.9, 0.99), optimizer=adam, discriminator_optimizer=adam), batches(3), tmp_path, Note())
    assert seen == [[(0.1, pytest.approx(annealed(0.9, 0.99, step / 3)))] * 2 for step in range(3)]


def test_a_batch_of_one_is_enough(lab: Path, tmp_path: Path) -> None:
    made = trained(recipe(lab, penalty_every=1), batches(2, size=1), tmp_path)
    assert all(parameter.isfinite().all() for parameter in made.parameters())


def test_noise_is_added_in_training_only(lab: Path) -> None:
    made = recipe(lab, noise=0.5)
    data = batches(1)[0]
    plain = made.network.decode(data["latent"].flatten(0, 1))
    assert not torch.allclose(made.reconstruct(data)[0], plain)
    assert torch.equal(made.eval().reconstruct(data)[0], plain)


def test_a_run_measures_draws_averages_and_exports_the_decoder(lab: Path, plain: dict[str, float]) -> None:
    for name in ("psnr", "ssim", "lpips_st_alex", "fd_efficientnet_lite0", "flicker"):
        assert math.isfinite(plain[f"val/{name}"])
    for name in ("l1", "adversarial", "discriminator", "r1", "r2", "logit_gap", "accuracy"):
        assert math.isfinite(plain[f"train/{name}"])
    assert plain["train/adversarial_weight"] == pytest.approx(0.075)
    assert (lab / "runs" / "plain" / "media" / "step-0000004" / "decoders.png").exists()
    content = stored(lab, "plain")
    assert {name.split(".")[0] for name in content["state_dict"]} == {"network", "discriminator"}
    assert {name.split(".")[0] for name in content["ema"]["raw"]} == {"network"}
    network, autoencoder = models.load(lab / "runs/plain/checkpoints/last.ckpt"), models.load(lab / "autoencoder")
    assert isinstance(network, ImageDecoder)
    assert encoder_of(network) == encoder_of(autoencoder)
    assert bool((network.latent_std != 1).all())
    before = autoencoder.decoder.state_dict()
    assert any(not torch.equal(weight, before[name]) for name, weight in network.decoder.state_dict().items())
    untrained = ImageDecoder.of(autoencoder)
    parts = zip(network.parameters(), untrained.parameters(), strict=True)
    assert max(float((a - b).abs().max()) for a, b in parts) < 0.01  # started where stage 1 ended


def test_another_architecture_is_trained_from_scratch_and_its_checkpoint_stands_alone(lab: Path) -> None:
    small = {"class_path": "owl.models.image_decoder.ImageDecoder", "init_args": {"widths": [8, 16], "blocks": [1, 1]}}
    small["init_args"] |= {"patch": 4}  # type: ignore[operator]
    fit(lab, "other", "--model.network", json.dumps(small))
    network = models.load(lab / "runs" / "other" / "checkpoints" / "last.ckpt")
    assert network.config["widths"] == [8, 16]
    assert network.decode(torch.zeros(1, 4, 4, 6)).shape == (1, 3, 32, 48)


def test_the_whole_autoencoder_may_be_trained_instead(lab: Path) -> None:
    options = ("--model.train_encoder", "true", "--trainer.callbacks", "null", "--model.weights.kl", "0.01")
    metrics = fit(lab, "whole", *options)
    assert metrics["train/kl"] > 0
    assert math.isfinite(metrics["val/flicker"])
    network, before = models.load(lab / "runs/whole/checkpoints/last.ckpt"), models.load(lab / "autoencoder")
    assert isinstance(network, ImageAutoencoder)
    assert encoder_of(network) != encoder_of(before)
    assert not torch.equal(network.latent_std, before.latent_std)
    assert {name.split(".")[0] for name in stored(lab, "whole")["state_dict"]} == {"network", "discriminator"}


def test_an_autoencoder_from_scratch_has_no_weights_of_stage_1(lab: Path) -> None:
    made, again = (recipe(lab, train_encoder=True, pretrained=pretrained) for pretrained in (False, True))
    weight = made.original.encoder.stem.parametrizations.weight.original1
    assert not torch.equal(made.network.encoder.stem.parametrizations.weight.original1, weight)
    assert torch.equal(again.network.encoder.stem.parametrizations.weight.original1, weight)


def test_a_latent_dataset_gives_what_encoding_in_training_gives(lab: Path, plain: dict[str, float]) -> None:
    assert owl_here("data", "encode", "autoencoder", "data", "latents", "--keep", "rgb,flow", cwd=lab) == 0
    modalities = ("--data.path", "latents", "--data.modalities", "[rgb, latent, flow]", "--trainer.callbacks", "null")
    encoded = fit(lab, "encoded", *modalities)
    for name in ("val/psnr", "train/loss", "train/discriminator"):
        assert encoded[name] == pytest.approx(plain[name], rel=3e-3)  # datasets hold float16


@pytest.mark.usefixtures("plain")
def test_latents_of_another_encoder_are_refused(lab: Path) -> None:
    save_autoencoder(lab / "other", seed=1)
    assert owl_here("data", "encode", "other", "data", "other-latents", "--keep", "rgb", cwd=lab) == 0
    found, expected = (encoder_of(models.load(lab / name)) for name in ("other", "autoencoder"))
    data = ("--data.path", "other-latents", "--data.modalities", "[rgb, latent]")
    for callbacks in ((), ("--trainer.callbacks", "null")):
        with refused("latents.encoder", found, expected):
            fit(lab, "refused", *data, *callbacks)
    other = ("--model.autoencoder", "other", "--ckpt_path", "runs/plain/checkpoints/last.ckpt")
    with refused("latents.encoder", found, expected):
        fit(lab, "refused", *other)


def test_what_does_not_fit_is_reported(lab: Path) -> None:
    models.save(ImageDecoder.of(models.load(lab / "autoencoder")), lab / "decoder")  # type: ignore[arg-type]
    with refused("network.kind", "decoder", "ImageDecoder", "ImageAutoencoder"):
        fit(lab, "refused", "--model.autoencoder", "decoder", "--trainer.callbacks", "null")
    with refused("network.input", "at least 2 frames", "length"):
        fit(lab, "refused", "--model.discriminator.frames", "2", "--data.length", "1")
    with refused("dataset.modalities", "latent", ENCODER):
        fit(lab, "refused", "--trainer.callbacks", "null")
    for option, own in (("gradient_clip_val", "clip"), ("accumulate_grad_batches", "accumulate")):
        with refused("trainer.refused", f"trainer.{option} is 2", "GANDecoder", f"model.init_args.{own}"):
            fit(lab, "refused", f"--trainer.{option}", "2")
    with refused("arguments.too-small", "penalty_every"):
        recipe(lab, penalty_every=0)
    for name in ("gamma", "noise"):
        with refused("recipe.arguments", f"{name} is -1.0"):
            recipe(lab, **{name: -1.0})
    with refused("recipe.arguments", "train_encoder", "network"):
        recipe(lab, train_encoder=True, network=ImageDecoder)


def test_penalties_are_refused_where_weights_are_sharded(lab: Path) -> None:
    made = recipe(lab, gamma=2.0)
    made._device_mesh = {"data_parallel": None}  # type: ignore[assignment]
    with refused("trainer.strategy", "gamma is 2.0", "ddp"):
        made.configure_model()


def with_flow(data: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [b | {"flow": torch.randn(*b["rgb"].shape[:2], 2, 16, 24, generator=generator)} for b in data]


def test_what_flickers_along_the_flow_is_a_term_of_the_loss(lab: Path, tmp_path: Path) -> None:
    weights = Weights(lpips=0.0, adversarial=0.0, temporal=2.0)
    made, data = recipe(lab, weights=weights), with_flow(batches(1, frames=3))
    decoder = copy.deepcopy(made.network)
    trained(made, data, tmp_path)
    true = data[0]["rgb"].float() / 127.5 - 1
    decoded = decoder.decode(data[0]["latent"].flatten(0, 1)).unflatten(0, true.shape[:2])
    loss = (decoded - true).abs().mean() + 2 * temporal(decoded, true, data[0]["flow"])
    slopes = torch.autograd.grad(loss, list(decoder.parameters()))
    for found, old, slope in zip(made.network.parameters(), decoder.parameters(), slopes, strict=True):
        torch.testing.assert_close(found, old - 0.05 * slope, rtol=1e-4, atol=1e-7)
    with refused("recipe.dataset", "flow", "data.init_args.modalities"):
        trained(recipe(lab, weights=weights), batches(1, frames=3), tmp_path)
    with refused("recipe.dataset", "flow", "data.init_args.length"):
        trained(recipe(lab, weights=weights), with_flow(batches(1)), tmp_path)


def test_a_decoder_that_takes_its_previous_frame_starts_as_stage_1_and_learns_to_use_it(
    lab: Path, tmp_path: Path
) -> None:
    made, data = recipe(lab, previous=True), batches(2, frames=2)
    made.eval()
    expected = made.original.decode(data[0]["latent"].flatten(0, 1))
    assert torch.equal(made.reconstruct(data[0])[0], expected)
    trained(made, data, tmp_path)
    assert made.network.hint.weight.any()
    assert not made.original.hint.weight.any()
    with refused("recipe.arguments", "previous"):
        recipe(lab, previous=True, train_encoder=True)
