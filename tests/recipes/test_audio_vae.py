"""The audio VAE: every weight acts, and it trains, resumes, exports, encodes and refuses as image VAEs do."""

import json
import wave
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from owl import models
from owl.data.windows import WindowDataset
from owl.models.audio_autoencoder import AudioAutoencoder
from owl.nn.frozen import trained
from owl.recipes.audio_vae import AudioVAE, Weights
from owl.recipes.sounds import PLAYED, draw_segments, sounds
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import REPOSITORY, owl_here, tiny_experiment, write_config
from tests.test_docs import blocks

TERMS = [field.name for field in fields(Weights)]
NONE = dict.fromkeys(TERMS, 0.0)
NETWORK: dict[str, Any] = {"strides": [4, 5], "widths": [4, 6, 8], "latent_channels": 3}


def recipe(weights: dict[str, float] | None = None, **options: Any) -> AudioVAE:
    torch.manual_seed(1)
    network = AudioAutoencoder(**NETWORK)
    made = AudioVAE(network, Weights(**(weights or {})), **{"prior_ramp": 0} | options)
    made.log = made.log_dict = lambda *arguments, **keywords: None  # no trainer is attached
    return made


def batch(size: int = 2) -> dict[str, Tensor]:
    return {"audio": 0.2 * torch.randn(size, 2, 1260, generator=torch.Generator().manual_seed(2))}


def gradient(made: AudioVAE) -> Tensor:
    """All gradients of one training step as a vector."""
    torch.manual_seed(3)
    made.zero_grad()
    made.training_step(batch(), 0).backward()
    parameters = made.network.parameters()
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])


@pytest.mark.parametrize("term", TERMS)
def test_every_weight_changes_the_gradient_in_proportion(term: str) -> None:
    base = NONE | {"stft": 1.0}
    without = gradient(recipe(base))
    once, twice = (gradient(recipe(base | {term: base[term] + weight})) for weight in (0.5, 1.0))
    change = once - without
    assert change.norm() > 1e-4 * without.norm()
    torch.testing.assert_close(twice - without, 2 * change, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("sample", "kl"), [(True, 0.0), (False, 0.1), (False, 0.0)])
def test_every_trained_weight_gets_a_gradient(sample: bool, kl: float) -> None:
    """DDP waits for all of them, and one that never had one has no state to be resumed."""
    made = recipe(NONE | {"l1": 1.0, "kl": kl}, sample=sample)
    gradient(made)
    assert [name for name, parameter in trained(made).items() if parameter.grad is None] == []
    assert any("logvar" in name for name in trained(made)) == (sample or kl > 0)


def test_all_weights_zero_is_reported() -> None:
    with refused("recipe.weights", "model.init_args.weights"):
        recipe(NONE)


def test_media_are_the_loudest_sounds_of_a_batch_and_their_reconstructions() -> None:
    made, given = recipe(), batch(PLAYED + 2)
    given["audio"][1:3] = 0
    shown = made.media(given)
    kept = torch.cat([*given["audio"][[0, 3, 4, 5]]], -1)
    assert torch.equal(torch.from_numpy(shown["sound_original"]), kept.clamp(-1, 1))
    assert shown["sound_reconstruction"].shape == kept.shape
    assert shown["spectrograms"].ndim == 3


def test_the_prior_trains_with_the_network_and_its_weight_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    base = NONE | {"l1": 1.0}
    made = recipe(base | {"prior": 4.0}, prior_ramp=8)
    monkeypatch.setattr(AudioVAE, "global_step", property(lambda _: steps))
    changes = []
    for steps in (0, 2, 8, 100):  # noqa: B007  (read by the property)
        changes.append(gradient(made) - gradient(recipe(base)))
    assert changes[0].norm() < 1e-6
    torch.testing.assert_close(changes[2], changes[1] * 4, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(changes[3], changes[2])
    assert made.prior is not None
    assert all(p.grad is not None and bool(p.grad.any()) for p in made.prior.parameters())
    assert list(models.exported(made)) == ["network"]


def test_segments_are_drawn_once_each_and_loud_ones_first() -> None:
    audio = torch.zeros(3, 2, 1250)
    audio[1, :, 300:600] = 0.5
    audio[2, :, 900:1200] = 0.5
    loud = 0
    for _ in range(20):
        drawn = draw_segments(audio, 300, 2)
        assert drawn.shape == (2, 2, 300)
        loud += int((drawn == 0.5).all((1, 2)).sum())
    assert loud > 36  # of 40, although 10 of 12 segments are silent
    numbered = torch.arange(1200.0).expand(2, 1, 1200) + torch.tensor([0.0, 5000.0])[:, None, None]
    every = draw_segments(numbered, 400, 6)
    assert sorted(every[:, 0, 0].tolist()) == [0, 400, 800, 5000, 5400, 5800]
    assert torch.equal(every[:, 0] - every[:, :1, 0], torch.arange(400.0).expand(6, -1))
    made = recipe(segments=3, segment_samples=1100)
    seen: list[Tensor] = []
    made.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    made.training_step(batch(4), 0)
    assert seen[0].shape == (3, 2, 1100)
    with refused("recipe.arguments", "segments is 3", "2", "1100"):
        made.training_step(batch(2), 0)


def test_other_batches_are_reported() -> None:
    for found in ({}, {"audio": torch.zeros(2, 9)}, {"audio": torch.zeros(1, 2, 9, dtype=torch.int16)}):
        with refused("recipe.dataset", "audio", "float32", "modalities"):
            sounds(found)
    mono = {"audio": torch.zeros(1, 1, 2000)}
    with refused("network.input", "[1, 1, 2000]", "2"):
        recipe().training_step(mono, 0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("sound"), 3, 40, modalities=["audio"])


def experiment(dataset: Path, **trainer: Any) -> dict[str, Any]:
    configuration = tiny_experiment(dataset, **trainer)
    network = {"class_path": "owl.models.audio_autoencoder.AudioAutoencoder", "init_args": NETWORK}
    configuration["model"] = {
        "class_path": "owl.recipes.audio_vae.AudioVAE",
        "init_args": {"network": network, "frechet": True, "warmup_steps": 2},
    }
    data = {"path": str(dataset), "modalities": ["audio"], "length": 2, "validation_length": 30}
    configuration["data"]["init_args"] = data | {"batch_size": 2, "num_workers": 0, "validation_windows": 2}
    return configuration


def test_a_run_is_heard_resumed_exactly_exported_and_encodes_a_dataset(dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", experiment(dataset, max_steps=4))
    arguments = ("fit", "--config", config, "--checkpoint.every_n_steps", "2")
    assert owl_here(*arguments, "--name", "whole", cwd=tmp_path) == 0
    assert owl_here(*arguments, "--name", "parts", "--trainer.max_steps", "2", cwd=tmp_path) == 0
    assert owl_here(*arguments, "--name", "parts", "--ckpt_path", "last", cwd=tmp_path) == 0
    whole, parts = (tmp_path / "runs" / name for name in ("whole", "parts"))
    reports = [json.loads((run / "metrics.json").read_text("utf-8")) for run in (whole, parts)]
    for name in ("val/si_sdr", "val/snr", "val/stft", "val/mel", "val/silence_level", "val/latent_kl"):
        assert reports[0][name] == reports[1][name]
    assert reports[0]["val/fd_speech_embedding"] >= 0

    with wave.open(str(whole / "media" / "step-0000004" / "sound_reconstruction.wav")) as file:
        assert (file.getframerate(), file.getnchannels()) == (44_100, 2)
    assert "sound_original.wav" in (whole / "report.md").read_text("utf-8")

    checkpoint = whole / "checkpoints" / "last.ckpt"
    assert owl_here("export", checkpoint, tmp_path / "export", cwd=tmp_path) == 0
    network, exported = models.load(checkpoint), models.load(tmp_path / "export")
    assert isinstance(network, AudioAutoencoder)
    audio = WindowDataset(dataset, "test", ["audio"], length=5)[0]["audio"][None]
    assert torch.equal(network(audio, sample=False)[0], exported(audio, sample=False)[0])
    assert float(network.latent_std.min()) > 0

    latents = tmp_path / "latents"
    assert owl_here("data", "encode", checkpoint, dataset, latents, "--keep", "audio", cwd=tmp_path) == 0
    sample = WindowDataset(latents, "test", ["audio_latent", "audio"], length=40)[0]
    mean = network.encode(sample["audio"][None]).mean
    torch.testing.assert_close(sample["audio_latent"].flatten(0, 1).T[None], mean, rtol=1e-2, atol=1e-2)
    assert sample["audio_latent"].shape == (40, 1260 // network.hop, 3)


def test_another_sample_rate_is_reported(dataset: Path, tmp_path: Path) -> None:
    configuration = experiment(dataset)
    configuration["model"]["init_args"]["network"]["init_args"] = NETWORK | {"sample_rate": 48_000}
    with refused("recipe.dataset", "44100", "48000", "sample_rate"):
        owl_here("fit", "--config", write_config(tmp_path / "config.yaml", configuration), cwd=tmp_path)


@pytest.mark.parametrize("causal", [False, True])
def test_the_examples_of_the_page_run(causal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network = AudioAutoencoder(**NETWORK | {"strides": [14, 45]}, causal=causal)
    models.save(network, "exports/audio_vae_quickstart")
    examples = [block.content for block in blocks(REPOSITORY / "docs/how-to/audio.md") if block.language == "python"]
    exec("".join(examples), {})
