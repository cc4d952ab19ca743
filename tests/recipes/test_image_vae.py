"""Every weight acts, a weight of 0 costs nothing, and what YAML can switch on keeps results and names."""

import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from owl import models
from owl.data.datamodule import ShardDataModule
from owl.losses.lpips import LPIPS
from owl.losses.reconstruction import ReconstructionWeights
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.image_decoder import ImageDecoder
from owl.nn.frozen import trained
from owl.recipes import image_vae
from owl.recipes.image_vae import ImageVAE, Weights
from owl.recipes.images import images
from tests.helpers.errors import refused
from tests.helpers.quantized import LEVELS, QuantizedAutoencoder
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import owl_here, tiny_experiment, write_config

TERMS = [field.name for field in fields(Weights)]
NONE = dict.fromkeys(TERMS, 0.0)


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return LPIPS()


def network(**options: Any) -> ImageAutoencoder:
    torch.manual_seed(1)
    shape = {"size": (32, 48), "latent_size": (4, 6), "latent_channels": 4, "widths": [8, 16, 16], "blocks": [1, 1, 1]}
    return ImageAutoencoder(**{**shape, **options})


def recipe(lpips: LPIPS, weights: dict[str, float], **options: Any) -> ImageVAE:
    made = ImageVAE(options.pop("network", None) or network(), Weights(**weights), lpips, **options)
    made.log = made.log_dict = lambda *arguments, **keywords: None  # no trainer is attached
    return made


def batch(size: int = 2, frames: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {"rgb": torch.randint(0, 256, (size, frames, 3, 32, 48), dtype=torch.uint8, generator=generator)}


def gradient(made: ImageVAE) -> Tensor:
    """All gradients of one training step as a vector."""
    torch.manual_seed(3)
    made.zero_grad()
    made.training_step(batch(), 0).backward()
    parameters = made.network.parameters()
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])


@pytest.mark.parametrize("term", TERMS)
def test_every_weight_changes_the_gradient_in_proportion(lpips: LPIPS, term: str) -> None:
    base = NONE | {"l1": 1.0}
    without = gradient(recipe(lpips, base))
    once, twice = (gradient(recipe(lpips, base | {term: base[term] + weight})) for weight in (0.5, 1.0))
    change = once - without
    assert change.norm() > 1e-4 * without.norm()
    torch.testing.assert_close(twice - without, 2 * change, rtol=1e-3, atol=1e-5)


def calls(made: ImageVAE) -> Counter[CodeType]:
    """How often a training step calls each function of owl."""
    counts: Counter[CodeType] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_globals.get("__name__", "").startswith("owl."):
            counts[frame.f_code] += 1

    sys.setprofile(count)
    try:
        made.training_step(batch(), 0)
    finally:
        sys.setprofile(None)
    return counts


@pytest.fixture(scope="module")
def own(lpips: LPIPS) -> dict[str, set[CodeType]]:
    """The functions that are called where a term alone has a weight, and where no other term alone has one."""
    alone = {term: set(calls(recipe(lpips, NONE | {term: 1.0}))) for term in TERMS}
    others = {term: set().union(*(alone[other] for other in TERMS if other != term)) for term in TERMS}
    return {term: alone[term] - others[term] for term in TERMS}


@pytest.mark.parametrize("term", TERMS)
def test_a_weight_of_zero_costs_nothing(lpips: LPIPS, own: dict[str, set[CodeType]], term: str) -> None:
    assert own[term]  # a term that is computed without a weight has no function that the others do not call
    counts = calls(recipe(lpips, NONE | {term: 1.0}))
    assert min(counts[function] for function in own[term]) == 1


def test_all_weights_zero_is_reported(lpips: LPIPS) -> None:
    with refused("recipe.weights", "model.init_args.weights"):
        recipe(lpips, NONE)


def test_terms_are_logged_unweighted_and_add_up(lpips: LPIPS) -> None:
    weights = {"l1": 1.0, "l2": 0.5, "logit_laplace": 0.01, "lpips": 0.1, "dwt": 0.2, "kl": 0.3}
    made, logged = recipe(lpips, weights), {}
    made.log = lambda name, value, **options: logged.update({name: value})
    made.log_dict = logged.update
    loss = made.training_step(batch(), 0)
    assert logged["train/loss"] == loss
    expected = sum(weight * logged[f"train/{term}"] for term, weight in weights.items())
    torch.testing.assert_close(loss, expected)


def test_the_mean_is_decoded_without_sampling(lpips: LPIPS) -> None:
    image = images(batch(frames=3))
    assert image.shape == (6, 3, 32, 48)
    assert -1 <= image.min() < -0.9
    assert 0.9 < image.max() <= 1

    def reconstruct(sample: bool) -> tuple[Tensor, Tensor]:
        made = recipe(lpips, NONE | {"l1": 1.0}, sample=sample)
        return made.reconstruct(image)[0], made.reconstruct(image)[0]

    first, second = reconstruct(False)
    assert torch.equal(first, second)
    first, second = reconstruct(True)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("sample", "kl"), [(True, 0.0), (False, 0.1), (False, 0.0)])
def test_every_trained_weight_gets_a_gradient(lpips: LPIPS, sample: bool, kl: float) -> None:
    """DDP waits for all of them, and one that never had one has no state to be resumed."""
    made = recipe(lpips, NONE | {"l1": 1.0, "kl": kl}, sample=sample)
    gradient(made)
    trained = [name for name, parameter in made.named_parameters() if parameter.requires_grad]
    assert [name for name in trained if made.get_parameter(name).grad is None] == []
    assert any("logvar" in name for name in trained) == (sample or kl > 0)


def test_lpips_crops_are_taken_alike_from_both(lpips: LPIPS, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(lpips, NONE | {"lpips": 1.0}, lpips_crop=32, lpips_samples=1)
    seen: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(LPIPS, "forward", lambda self, x, y: seen.append((x, y)) or x.mean(dim=(1, 2, 3)))
    image = images(batch(4))
    made.reconstruction_loss.perceptual(image, image)
    ((x, y),) = seen
    assert x.shape == (1, 3, 32, 32)
    assert torch.equal(x, y)


def test_one_transform_a_step_serves_all_losses(
    lpips: LPIPS, own: dict[str, set[CodeType]], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, compared = [], []
    real = image_vae.draw
    monkeypatch.setattr(image_vae, "draw", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1])
    made = recipe(lpips, dict.fromkeys(TERMS, 0.1), equivariance=1.0)
    terms = made.terms
    made.terms = lambda *arguments: compared.append(arguments) or terms(*arguments)  # type: ignore[method-assign]
    for step in range(4):
        torch.manual_seed(step)
        counts = calls(made)
        assert all(min(counts[function] for function in functions) == 1 for functions in own.values())
        assert len(drawn) == len(compared) == step + 1
        reconstructed, image, _ = compared[-1]
        assert torch.equal(image, drawn[-1](images(batch())))
        assert reconstructed.shape == image.shape
    assert len(set(drawn)) > 1


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (1.0, 8)])
def test_equivariance_is_drawn_with_its_probability(
    lpips: LPIPS, monkeypatch: pytest.MonkeyPatch, probability: float, expected: int
) -> None:
    drawn, real = [], image_vae.draw
    monkeypatch.setattr(image_vae, "draw", lambda *a, **k: drawn.append(1) or real(*a, **k))
    made = recipe(lpips, NONE | {"l1": 1.0}, equivariance=probability)
    for _ in range(8):
        made.training_step(batch(), 0)
    assert len(drawn) == expected


def test_equivariance_with_learned_ends_only_turns_round(lpips: LPIPS) -> None:
    square = network(size=(24, 48), latent_size=(4, 6))  # a grid of 32x48
    made = recipe(lpips, NONE | {"l1": 1.0}, network=square, equivariance=1.0, sample=False)
    image = torch.rand(2, 3, 24, 48) * 2 - 1
    reconstruction, target, posterior, _ = made.reconstruct(image)
    assert torch.equal(target, image.flip(-1, -2))
    torch.testing.assert_close(reconstruction, square.decode(posterior.mean.flip(-1, -2)))


def auxiliary(*geometry: Any) -> ImageDecoder:
    torch.manual_seed(5)
    return ImageDecoder(*geometry, widths=[8, 8], blocks=[1, 1], patch=4)


def gradients(made: ImageVAE) -> dict[str, Tensor]:
    """The gradient of one training step, a vector for each part."""
    gradient(made)
    parts = {"encoder": made.network.encoder, "decoder": made.network.decoder, "auxiliary": made.auxiliary}
    found = {}
    for name, part in parts.items():
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in part.parameters()]
        found[name] = torch.cat([grad.flatten() for grad in grads])
    return found


@pytest.mark.parametrize("equivariance", [0.0, 1.0])
def test_with_an_auxiliary_decoder_the_encoder_learns_through_it_alone(lpips: LPIPS, equivariance: float) -> None:
    base, none = NONE | {"l1": 1.0}, ReconstructionWeights(l1=0.0, lpips=0.0, l2=1e-30)

    def of(weights: dict[str, float], own: ReconstructionWeights | None = None) -> dict[str, Tensor]:
        return gradients(recipe(lpips, weights, equivariance=equivariance, auxiliary=auxiliary, auxiliary_weights=own))

    both, main, other = of(base), of(base, none), of(NONE | {"l1": 1e-30}, ReconstructionWeights(lpips=0.0))
    assert both["encoder"].norm() > 0
    assert main["encoder"].norm() < 1e-12 * both["encoder"].norm()
    torch.testing.assert_close(other["encoder"], both["encoder"])
    torch.testing.assert_close(main["decoder"], both["decoder"])
    torch.testing.assert_close(other["auxiliary"], both["auxiliary"])
    assert min(both["decoder"].norm(), both["auxiliary"].norm()) > 1e-3


def test_the_divergence_is_that_of_the_posterior(lpips: LPIPS) -> None:
    made = recipe(lpips, NONE | {"kl": 1.0})
    posterior = made.network.encode(images(batch()))
    deviation = posterior.logvar.mul(0.5).exp().expand_as(posterior.mean)
    distribution = torch.distributions.Normal(posterior.mean, deviation)
    expected = torch.distributions.kl_divergence(distribution, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(made.training_step(batch(), 0), expected)


def test_the_log_variance_makes_the_round_trip(lpips: LPIPS) -> None:
    made = recipe(lpips, NONE | {"kl": 1.0})
    posterior = made.network.encode(images(batch()))
    samples = torch.stack([posterior.sample() for _ in range(400)])
    torch.testing.assert_close(
        samples.var(dim=0).mean(dim=(1, 2, 3)).log(), posterior.logvar.mean(dim=(1, 2, 3)), atol=0.03, rtol=0
    )


def test_a_bottleneck_without_a_posterior_has_no_divergence(lpips: LPIPS) -> None:
    quantized = QuantizedAutoencoder(**network().config)
    with refused("recipe.weights", "weights.kl is 0.1", "QuantizedAutoencoder", "model.init_args.weights.kl"):
        recipe(lpips, {"kl": 0.1}, network=quantized)
    made = recipe(lpips, NONE | {"l1": 1.0}, network=quantized)
    gradient(made)
    assert [name for name, p in made.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad.abs().sum() > 0 for p in quantized.encoder.mean.parameters())  # through the rounding


class Committed(QuantizedAutoencoder):
    """Also pulls the encoder towards its codes, as vector quantisers do."""

    losses = ("commitment",)


def test_a_loss_of_the_bottleneck_counts_as_it_is(lpips: LPIPS) -> None:
    made, logged = recipe(lpips, NONE | {"l1": 1.0}, network=Committed(**network().config)), {}
    made.log_dict = logged.update
    loss = made.training_step(batch(), 0)
    assert logged.keys() == {"train/l1", "train/commitment"}
    torch.testing.assert_close(loss, logged["train/l1"] + logged["train/commitment"])


def test_activation_checkpointing_changes_no_gradient(lpips: LPIPS) -> None:
    weights = NONE | {"l1": 1.0, "kl": 0.1}
    plain = gradient(recipe(lpips, weights))
    saved = gradient(recipe(lpips, weights, network=network(checkpoint=True)))
    torch.testing.assert_close(saved, plain)


def test_the_perceptual_network_is_a_constant(lpips: LPIPS) -> None:
    made = recipe(lpips, {})
    assert set(trained(made)) == {f"network.{name}" for name, _ in made.network.named_parameters()}
    assert all(name.startswith("network.") for name in made.state_dict())
    made.train()
    assert not made.reconstruction_loss.lpips.trunk.training
    assert not made.metrics.frechet.features.training


# --- through the command line


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image_vae")
    data = make_dataset(folder / "data", episodes=4, frames=6, size=(32, 48), modalities=("rgb",))
    experiment = tiny_experiment(data, max_steps=2)
    write_config(folder / "tiny.yaml", experiment)
    return folder


def fit(lab: Path, name: str, *options: str) -> dict[str, Any]:
    assert owl_here("fit", "--config", "tiny.yaml", "--name", name, *options, cwd=lab) == 0
    return torch.load(lab / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def plain(lab: Path) -> dict[str, Any]:
    return fit(lab, "plain")


def test_statistics_of_the_latents_are_in_the_checkpoint(lab: Path, plain: dict[str, Any]) -> None:
    """Of the averaged weights' latents, over all that validation saw."""
    averaged = models.load(lab / "runs" / "plain" / "checkpoints" / "last.ckpt")
    data = ShardDataModule(str(lab / "data"), size=(32, 48), batch_size=4, num_workers=0, validation_windows=2)
    data.setup("validate")
    (seen,) = data.val_dataloader()
    images = seen["rgb"].flatten(0, 1).float() / 127.5 - 1

    def statistics(weights: dict[str, Tensor]) -> Tensor:
        averaged.load_state_dict({n.removeprefix("network."): w for n, w in weights.items()}, strict=False)
        with torch.no_grad():
            latent = averaged.encode(images).mean
        return torch.stack([latent.mean((0, 2, 3)), latent.std((0, 2, 3), correction=0)])

    stored = torch.stack([plain["state_dict"][f"network.latent_{name}"] for name in ("mean", "std")])
    torch.testing.assert_close(stored, statistics(plain["state_dict"]), atol=1e-6, rtol=1e-5)
    assert (stored - statistics(plain["ema"]["raw"])).abs().max() > 1e-5


def test_an_auxiliary_decoder_is_trained_and_resumed_but_not_exported(lab: Path, plain: dict[str, Any]) -> None:
    options = ["--model.auxiliary", "owl.models.image_decoder.ImageDecoder"]
    options += [f"--model.auxiliary.{name}={value}" for name, value in (("widths", "[8]"), ("blocks", "[1]"))]
    options += ["--model.auxiliary.patch=8", "--model.auxiliary_weights.lpips=0"]
    fit(lab, "auxiliary-stopped", *options, "--trainer.max_steps=1", "--model.final_lr=1")
    whole = fit(lab, "auxiliary", *options, "--model.final_lr=1")
    resumed = fit(lab, "auxiliary-stopped", *options, "--model.final_lr=1", "--ckpt_path", "last")
    for key in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(resumed[key], whole[key], rtol=0, atol=0)
    auxiliary = [name for name in whole["state_dict"] if name.startswith("auxiliary.") and "latent_" not in name]
    trained = [len(run["optimizer_states"][0]["state"]) for run in (whole, plain)]
    assert trained[0] - trained[1] == len(auxiliary) > 5
    assert whole["ema"]["raw"].keys() == plain["ema"]["raw"].keys()
    network = models.load(lab / "runs" / "auxiliary" / "checkpoints" / "last.ckpt")
    assert {f"network.{name}" for name in network.state_dict()} == plain["state_dict"].keys()


def test_bfloat16_trains_and_keeps_weights_in_float32(lab: Path, plain: dict[str, Any]) -> None:
    half = fit(lab, "bf16", "--trainer.precision", "bf16-mixed", "--model.weights.lpips", "0.1")
    assert half["state_dict"].keys() == plain["state_dict"].keys()
    for name, tensor in half["state_dict"].items():
        assert tensor.dtype == torch.float32, name
        assert tensor.isfinite().all(), name
    assert half["owl"]["metrics"]["train/l1"] == pytest.approx(plain["owl"]["metrics"]["train/l1"], rel=0.1)


def test_compiling_keeps_names_and_results(lab: Path, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile(module: torch.nn.Module) -> None:
        compiled.append(type(module).__name__)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")  # needs no C++ compiler

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    found = fit(lab, "compiled", "--model.compile", "true")
    assert compiled == ["Encoder", "Decoder"]
    assert found["state_dict"].keys() == plain["state_dict"].keys()
    torch.testing.assert_close(dict(found["state_dict"]), dict(plain["state_dict"]), atol=1e-5, rtol=1e-4)
    models.load(lab / "runs/compiled/checkpoints/last.ckpt")
    assert compiled == ["Encoder", "Decoder"]  # for training alone


def test_equivariance_compiles_the_decoder_once_for_all_sizes_and_turns() -> None:
    """And once for the size of the footage."""
    size = {"size": (96, 160), "latent_size": (12, 20), "latent_channels": 4, "widths": [8, 8, 8], "blocks": [1, 1, 1]}
    recipe = ImageVAE(ImageAutoencoder(**size), Weights(lpips=0.0))
    recipe.configure_model()
    compiled = CompileCounter()
    decoder = recipe.network.decoder
    decoder._compiled_call_impl = torch.compile(decoder._call_impl, backend=compiled)
    image = torch.rand(2, 3, 96, 160).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    sizes = set()
    for step in range(20):
        recipe.equivariance = float(step % 2)
        sizes.add(recipe.reconstruct(image)[0].shape)
    assert len(sizes) > 6
    assert compiled.frame_count == 2


def test_another_bottleneck_is_another_network_in_yaml(lab: Path) -> None:
    """Finite scalar quantisation in a file of its own: trained, measured, and loaded."""
    kind = "tests.helpers.quantized.QuantizedAutoencoder"
    stored = fit(lab, "quantized", "--model.network.class_path", kind, "--model.weights.kl", "0")
    assert "val/psnr" in stored["owl"]["metrics"]
    assert "val/latent_overall_std" in stored["owl"]["metrics"]
    assert not any("kl" in name for name in stored["owl"]["metrics"])
    loaded = models.load(lab / "runs/quantized/checkpoints/last.ckpt")
    codes = loaded.encode(images(batch())).mean * (LEVELS // 2)
    assert torch.equal(codes, codes.round())
    assert codes.unique().numel() > 1


def test_muon_is_chosen_in_yaml(lab: Path) -> None:
    stored = fit(lab, "muon", "--model.optimizer", "owl.optim.MuonAdamW", "--model.optimizer.lr", "0.002")
    (optimizer,) = stored["optimizer_states"]
    groups = {group["algorithm"]: group for group in optimizer["param_groups"]}
    assert groups.keys() == {"muon", "adamw"}
    assert groups["adamw"]["initial_lr"] == 0.002
    parameters = sum(len(group["params"]) for group in groups.values())
    assert parameters == len(optimizer["state"]) == len(stored["ema"]["raw"])  # the network's, and nothing else


def test_the_schedule_warms_up_and_ends_low(lab: Path) -> None:
    stored = fit(lab, "schedule", "--trainer.max_steps", "4", "--model.final_lr", "0.1")
    (schedule,) = stored["lr_schedulers"]
    assert schedule["last_epoch"] == 4
    assert schedule["_last_lr"] == [pytest.approx(0.1 * 3e-4)]
