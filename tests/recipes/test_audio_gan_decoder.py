"""The recipe: both losses against plain autograd, every term acts, runs are resumed exactly, what is refused."""

import copy
import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from owl import models
from owl.latents import encoder_of
from owl.losses.adversarial import OBJECTIVES
from owl.losses.audio import MultiResolutionSTFT
from owl.losses.feature_matching import feature_matching
from owl.models.audio_decoder import AudioDecoder
from owl.models.audio_discriminators import CombinedDiscriminator
from owl.recipes.audio_gan_decoder import AudioGANDecoder, Weights
from tests.helpers.autoencoders import ENCODER, save_audio_autoencoder, save_autoencoder
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import owl_here, quiet_trainer, tiny_experiment, write_config

TERMS = [field.name for field in fields(Weights)]
NONE = dict.fromkeys(TERMS, 0.0)
SAMPLES = 20 * 105


class Given(AudioGANDecoder):
    """Trains on latents that nothing describes."""

    def setup(self, stage: str) -> None:
        """Nothing to read."""

    def on_fit_start(self) -> None:
        """Nothing to check."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audio_gan")
    make_dataset(folder / "data", episodes=5, frames=6, modalities=("rgb", "audio"))
    save_audio_autoencoder(folder / "autoencoder")
    experiment = tiny_experiment(
        Path("data"), callbacks=[{"class_path": ENCODER, "init_args": {"path": "${model.init_args.autoencoder}"}}]
    )
    experiment["model"] = {
        "class_path": "owl.recipes.audio_gan_decoder.AudioGANDecoder",
        "init_args": {
            "autoencoder": "autoencoder",
            "discriminator": {
                "class_path": "owl.models.audio_discriminators.CombinedDiscriminator",
                "init_args": {"fft_sizes": [64], "width": 4, "periods": [2], "period_widths": [4, 4]},
            },
            "adversarial_start": 1,
            "adversarial_ramp": 4,
            "warmup_steps": 2,
        },
    }
    experiment["data"]["init_args"] |= {"modalities": ["audio"], "length": 3, "size": None, "batch_size": 2}
    write_config(folder / "tiny.yaml", experiment)
    return folder


def fit(lab: Path, name: str, *options: str) -> dict[str, float]:
    assert owl_here("fit", "--config", "tiny.yaml", "--name", name, *options, cwd=lab) == 0
    return json.loads((lab / "runs" / name / "metrics.json").read_text("utf-8"))


def stored(lab: Path, name: str) -> dict[str, Any]:
    return torch.load(lab / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)


def recipe(lab: Path, weights: dict[str, float] | None = None, **options: Any) -> Given:
    torch.manual_seed(0)
    return Given(
        str(lab / "autoencoder"),
        CombinedDiscriminator(2, [64, 16], 4, [2, 3], [4, 4]),
        **{
            "weights": Weights(**(weights or {})),
            "optimizer": lambda p: SGD(p, lr=0.05),
            "discriminator_optimizer": lambda p: SGD(p, lr=0.02),
            "adversarial_ramp": 0,
            "clip": None,
            "warmup_steps": 0,
            "final_lr": 1.0,
        }
        | options,
    )


def batches(count: int, size: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    audio = 0.2 * torch.randn(count, size, 2, SAMPLES, generator=generator)
    latent = torch.randn(count, size, 5, 4, 4, generator=generator)
    return [{"audio": a, "audio_latent": b} for a, b in zip(audio, latent, strict=True)]


def trained(made: Given, data: list[dict[str, Tensor]], folder: Path) -> Given:
    quiet_trainer(folder, max_steps=len(data)).fit(made, DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    return made


def shares(terms: dict[str, Tensor], weights: dict[str, float], decoded: Tensor) -> Tensor:
    """The balanced gradient at the first step, in which averages are the norms themselves."""
    total = torch.zeros_like(decoded)
    for name, term in terms.items():
        (gradient,) = torch.autograd.grad(term, decoded, retain_graph=True)
        norm = gradient.flatten(1).norm(dim=1).mean()
        total += weights[name] / sum(weights[name] for name in terms) * gradient / norm
    return total


def simulate(made: Given, data: list[dict[str, Tensor]]) -> tuple[nn.Module, nn.Module]:
    """The same training in plain PyTorch, with every loss in one graph."""
    decoder, judge = copy.deepcopy(made.network), copy.deepcopy(made.discriminator)
    weights = asdict(made.weights)
    for batch in data:
        decoded = decoder.decode(batch["audio_latent"].flatten(1, 2).transpose(1, 2))
        real, fake, detached = (judge(audio) for audio in (batch["audio"], decoded, decoded.detach()))
        adversarial = [made.objective.generator(f.logits, r.logits) for r, f in zip(real, fake, strict=True)]
        for_judge = [made.objective.discriminator(r.logits, f.logits) for r, f in zip(real, detached, strict=True)]
        terms = made.audio_loss(decoded, batch["audio"])
        terms["adversarial"] = torch.stack(adversarial).mean()
        terms["features"] = feature_matching([f.features for f in fake], [r.features for r in real])
        if made.balancer is None:
            slopes = torch.autograd.grad(
                sum(weights[name] * term for name, term in terms.items()), list(decoder.parameters()), retain_graph=True
            )
        else:
            slopes = torch.autograd.grad(
                decoded, list(decoder.parameters()), shares(terms, weights, decoded), retain_graph=True
            )
        judge_slopes = torch.autograd.grad(torch.stack(for_judge).mean(), list(judge.parameters()))
        with torch.no_grad():
            for network, gradients, rate in ((decoder, slopes, 0.05), (judge, judge_slopes, 0.02)):
                for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                    parameter -= rate * gradient
    return decoder, judge


@pytest.mark.parametrize(
    ("options", "steps"), [*(({"objective": name}, 3) for name in OBJECTIVES), ({"balance": True}, 1)]
)
def test_both_networks_learn_what_plain_autograd_says(
    lab: Path, tmp_path: Path, options: dict[str, Any], steps: int
) -> None:
    made = recipe(lab, **options)
    decoder, judge = simulate(made, batches(steps))
    before = {name: parameter.clone() for name, parameter in made.named_parameters()}
    trained(made, batches(steps), tmp_path)
    for found, expected, part in ((made.network, decoder, "network"), (made.discriminator, judge, "discriminator")):
        moved = torch.cat([(p - before[f"{part}.{n}"]).flatten() for n, p in found.named_parameters()])
        wanted = torch.cat([(p - before[f"{part}.{n}"]).flatten() for n, p in expected.named_parameters()])
        assert wanted.norm() > 1e-4
        assert (moved - wanted).norm() < 5e-3 * wanted.norm()  # sums in another order, through three steps


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("term", TERMS)
def test_every_weight_reaches_the_gradient(lab: Path, tmp_path: Path, term: str, balance: bool) -> None:
    """What one step of plain gradient descent changes in the decoder."""
    base = NONE | {"stft": 1.0}
    moved = []
    for weights in (base, base | {term: base[term] + 0.5}):
        made = recipe(lab, weights, balance=balance)
        before = nn.utils.parameters_to_vector(made.network.parameters()).detach().clone()
        trained(made, batches(1), tmp_path)
        moved.append(nn.utils.parameters_to_vector(made.network.parameters()).detach() - before)
    changed = (moved[1] - moved[0]).norm() / moved[0].norm()
    if balance and term == "stft":  # the only term has the whole gradient, whatever its weight
        assert changed < 1e-5
    else:
        assert changed > 1e-3


def test_reversed_polarity_raises_the_loss(lab: Path) -> None:
    made, audio = recipe(lab), batches(1)[0]["audio"]
    real = made.discriminator(audio)
    same, reversed_ = ({**made.audio_loss(x, audio), **made.adversarial_terms(x, real)} for x in (audio, -audio))
    assert float(same["features"]) == 0
    assert float(reversed_["features"]) > 0.3  # the discriminator sees the sign of a sample or of a phase
    assert float(reversed_["l1"]) > 0.1
    assert float(reversed_["stft"]) == pytest.approx(float(same["stft"]), abs=1e-5)  # which alone would not see it


def test_the_discriminator_learns_from_the_first_step_and_the_decoder_from_reconstruction_alone(
    lab: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"objective": "lsgan"}  # hinge pulls the last bias in both directions
    ramped = recipe(lab, adversarial_start=2, adversarial_ramp=4, **options)
    assert [ramped.adversarial_share(step) for step in range(7)] == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    alone = recipe(lab, {"adversarial": 0.0, "features": 0.0}, **options)
    before = copy.deepcopy(ramped.discriminator.state_dict())
    for made in (ramped, alone):
        trained(made, batches(2), tmp_path)
    for a, b in zip(ramped.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)
    moved = [bool((value != before[name]).any()) for name, value in ramped.discriminator.state_dict().items()]
    assert all(moved)


def test_silent_and_clipped_sound_is_learnt_without_nan(lab: Path, tmp_path: Path) -> None:
    data = batches(2)
    data[0]["audio"].zero_()
    data[1]["audio"].mul_(50).clamp_(-1, 1)
    for balance in (False, True):
        made = trained(recipe(lab, balance=balance), data, tmp_path)
        assert all(parameter.isfinite().all() for parameter in made.parameters())


def test_segments_pair_true_and_decoded_sound_and_loud_ones_are_judged(lab: Path, tmp_path: Path) -> None:
    class Reversed(Given):
        def reconstruct(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return batch["audio"], -batch["audio"] + 0 * super().reconstruct(batch)[1]

    data = batches(1)
    data[0]["audio"][0, :, 525:] *= 1e-6
    data[0]["audio"][1] *= 1e-6
    torch.manual_seed(0)
    judge = CombinedDiscriminator(2, [64], 4, [2], [4])
    made = Reversed(str(lab / "autoencoder"), judge, segments=2, segment_samples=525, warmup_steps=0)
    made.audio_loss.stft = MultiResolutionSTFT([256, 64])
    seen: list[Tensor] = []
    made.audio_loss.register_forward_hook(lambda module, sounds, terms: seen.extend((*sounds, terms["stft"])))
    trained(made, data, tmp_path)
    decoded, audio, stft = seen
    assert audio.shape == decoded.shape == (2, 2, 525)
    assert (audio == data[0]["audio"][0, :, :525]).all((1, 2)).any()  # the only loud one
    torch.testing.assert_close(decoded, -audio)
    assert float(stft) < 1e-4


def test_noise_is_added_in_training_only(lab: Path) -> None:
    made, batch = recipe(lab, noise=0.5), batches(1)[0]
    audio, decoded = made.reconstruct(batch)
    plain = made.network.decode(batch["audio_latent"].flatten(1, 2).transpose(1, 2))
    assert torch.equal(audio, batch["audio"])
    assert not torch.allclose(decoded, plain)
    assert torch.equal(made.eval().reconstruct(batch)[1], plain)


def test_samples_after_the_last_whole_latent_are_left_out(lab: Path) -> None:
    made, batch = recipe(lab).eval(), batches(1)[0]
    batch["audio_latent"] = batch["audio_latent"].flatten(1, 2)[:, :-1]
    batch["audio"] = batch["audio"][..., :-5]
    audio, decoded = made.reconstruct(batch)
    assert audio.shape == decoded.shape == (2, 2, SAMPLES - 105)
    batch["audio_latent"] = batch["audio_latent"][:, :-1]
    with refused("recipe.dataset", "audio_latent", str(SAMPLES - 210), str(SAMPLES - 5), "105", "stride"):
        made.reconstruct(batch)


def test_a_run_is_heard_averaged_exported_and_resumed_exactly(lab: Path) -> None:
    fixed = ("--model.balance", "true", "--model.final_lr", "1.0")
    whole = fit(lab, "whole", *fixed)
    fit(lab, "parts", *fixed, "--trainer.max_steps", "3")
    fit(lab, "parts", *fixed, "--ckpt_path", "last")
    content, resumed = stored(lab, "whole"), stored(lab, "parts")
    assert resumed["global_step"] == content["global_step"] == whole["steps"] == 4
    for key in ("state_dict", "optimizer_states", "ema"):
        torch.testing.assert_close(resumed[key], content[key], rtol=0, atol=0)

    for name in ("val/si_sdr", "val/snr", "val/stft", "val/mel", "train/features", "train/adversarial"):
        assert math.isfinite(whole[name])
    assert whole["train/adversarial_share"] == pytest.approx(0.75)
    for name in ("original", "stage_1", "adversarial"):
        assert (lab / "runs/whole/media/step-0000004" / f"sound_{name}.wav").exists()
    assert {name.split(".")[0] for name in content["state_dict"]} == {"network", "discriminator", "balancer"}
    assert {name.split(".")[0] for name in content["ema"]["raw"]} == {"network"}
    assert len(content["optimizer_states"]) == 2
    assert content["state_dict"]["balancer.steps"].tolist() == [3, 3, 4, 0, 4]  # by name; the first two from step 1 on

    network, autoencoder = models.load(lab / "runs/whole/checkpoints/last.ckpt"), models.load(lab / "autoencoder")
    assert isinstance(network, AudioDecoder)
    assert encoder_of(network, "audio_latent") == encoder_of(autoencoder)
    assert bool((network.audio_latent_std != 1).all())
    untrained = AudioDecoder.of(autoencoder)
    parts = zip(network.parameters(), untrained.parameters(), strict=True)
    assert 0 < max(float((a - b).abs().max()) for a, b in parts) < 0.01  # started where stage 1 ended


def test_latents_of_a_dataset_train_like_those_of_the_callback(lab: Path) -> None:
    """In windows of a whole episode, of which both encoders hear the same."""
    assert owl_here("data", "encode", "autoencoder", "data", "latents", "--keep", "audio", cwd=lab) == 0
    whole = ("--data.length", "6", "--trainer.max_steps", "1", "--model.adversarial_start", "0")
    found = fit(lab, "encoding", *whole)
    data = ("--data.path", "latents", "--data.modalities", "[audio, audio_latent]", "--trainer.callbacks", "null")
    encoded = fit(lab, "encoded", *whole, *data)
    for name in ("train/loss", "train/stft", "train/features", "train/discriminator", "val/snr"):
        assert encoded[name] == pytest.approx(found[name], rel=3e-3, abs=1e-3)  # datasets hold float16


def test_what_does_not_fit_is_reported(lab: Path) -> None:
    save_autoencoder(lab / "pictures")
    with refused("network.kind", "pictures", "ImageAutoencoder", "AudioAutoencoder"):
        fit(lab, "refused", "--model.autoencoder", "pictures", "--trainer.callbacks", "null")
    with refused("dataset.modalities", "audio_latent", "it holds rgb, audio", ENCODER):
        fit(lab, "refused", "--trainer.callbacks", "null")
    with refused("recipe.dataset", "hold rgb", "audio_latent", "audio"):
        fit(lab, "refused", "--data.modalities", "[rgb]")
    with refused("network.input", "at least 64 samples", "length"):
        recipe(lab).discriminator(torch.zeros(1, 2, 60))
    with refused("recipe.weights", "model.init_args.weights"):
        recipe(lab, NONE)
    with refused("recipe.weights", "stft, l1 and l2 are 0", "adversarial_start is 3"):
        recipe(lab, NONE | {"adversarial": 1.0}, adversarial_start=3)
    recipe(lab, NONE | {"adversarial": 1.0}, adversarial_start=0)
    with refused("recipe.arguments", "noise is -1"):
        recipe(lab, noise=-1)
    for latent in ({}, {"audio_latent": torch.zeros(2, 9)}):
        with refused("recipe.dataset", "audio_latent", "FrozenEncoder"):
            recipe(lab).reconstruct({"audio": torch.zeros(2, 2, SAMPLES)} | latent)


def test_latents_of_another_encoder_or_without_whole_frames_are_refused(lab: Path) -> None:
    save_audio_autoencoder(lab / "other", seed=1)
    assert owl_here("data", "encode", "other", "data", "other-latents", "--keep", "audio", cwd=lab) == 0
    found, expected = (encoder_of(models.load(lab / name)) for name in ("other", "autoencoder"))
    data = ("--data.path", "other-latents", "--data.modalities", "[audio, audio_latent]")
    for callbacks in ((), ("--trainer.callbacks", "null")):
        with refused("latents.encoder", found, expected):
            fit(lab, "refused", *data, *callbacks)
    save_audio_autoencoder(lab / "odd", strides=[4, 5, 5])
    assert owl_here("data", "encode", "odd", "data", "odd-latents", "--keep", "audio", cwd=lab) == 0
    odd = ("--model.autoencoder", "odd", "--data.path", "odd-latents", "--data.modalities", "[audio, audio_latent]")
    with refused("recipe.dataset", "odd-latents", "441 tokens", "FrozenEncoder"):
        fit(lab, "refused", *odd, "--trainer.callbacks", "null")
    assert math.isfinite(fit(lab, "odd", "--model.autoencoder", "odd", "--trainer.max_steps", "1")["val/snr"])
