"""Metrics of sound: closed forms, silence, and what each of them can and cannot hear."""

import builtins
import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from owl.metrics import audio as module
from owl.metrics.audio import (
    BLOCK,
    QUIETEST,
    AudioMetrics,
    FrechetAudioDistance,
    MeanOverHeard,
    MelDistance,
    SilenceLevel,
    SpeechEmbedding,
    heard,
    si_sdr,
    snr,
)
from tests.helpers.errors import refused

RATE = 44_100


def noise(batch: int = 3, samples: int = RATE, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(batch, 2, samples, generator=torch.Generator().manual_seed(seed))


def test_signal_ratios_of_added_noise() -> None:
    x, other = noise(), noise(seed=1)
    assert si_sdr(x + 0.1 * other, x).mean().item() == pytest.approx(20, abs=0.1)
    assert snr(x + 0.1 * other, x).mean().item() == pytest.approx(20, abs=0.1)
    torch.testing.assert_close(si_sdr(3 * (x + 0.1 * other), x), si_sdr(x + 0.1 * other, x))


def test_only_the_signal_to_noise_ratio_hears_reversed_polarity() -> None:
    x = noise()
    assert si_sdr(-x, x).min() > 60
    assert snr(-x, x).max().item() == pytest.approx(-6.02, abs=0.01)


def test_a_silent_channel_counts_with_its_energy() -> None:
    x = noise() * torch.tensor([1.0, 0.0])[:, None]
    assert si_sdr(x + 0.1 * noise(seed=1), x).mean().item() == pytest.approx(17, abs=0.1)


def test_mel_distance_of_a_change_of_level() -> None:
    x = noise()
    assert MelDistance(RATE)(x * 0.5, x).mean().item() == pytest.approx(6.02, abs=0.05)
    assert torch.equal(MelDistance(RATE)(x, x), torch.zeros(3))


def test_silent_sounds_are_left_out_of_the_mean() -> None:
    x = torch.cat([noise(2), torch.zeros(1, 2, RATE)])
    assert heard(x).tolist() == [True, True, False]
    metric = MeanOverHeard(snr)
    metric.update(x + 0.1 * noise(seed=1), x)
    metric.update(x[2:], x[2:])
    assert metric.compute().item() == pytest.approx(20, abs=0.1)
    metric.reset()
    metric.update(x[2:], x[2:])
    assert metric.compute().isnan()


def test_the_level_in_silence_is_that_of_what_was_added_there() -> None:
    x = noise(1, 100 * BLOCK)
    x[..., 40 * BLOCK : 60 * BLOCK] = 0
    metric = SilenceLevel()
    metric.update(x, x)
    assert metric.compute() == QUIETEST
    metric.reset()
    added = torch.where(x == 0, 0.01 * noise(1, 100 * BLOCK, seed=1), torch.zeros(()))
    metric.update(x + added, x)
    assert metric.compute().item() == pytest.approx(-60, abs=0.3)
    metric.reset()
    metric.update(noise(), noise())
    assert metric.compute() == QUIETEST  # no silence


def test_the_frechet_distance_orders_faults() -> None:
    def distance(reconstruction: Tensor, audio: Tensor) -> float:
        metric = FrechetAudioDistance(RATE)
        for a, b in zip(reconstruction.split(2), audio.split(2), strict=True):
            metric.update(a, b)
        metric.update(torch.ones(1, 2, RATE), torch.zeros(1, 2, RATE))  # left out
        return metric.compute().item()

    time = torch.arange(RATE) / RATE
    pitch = torch.linspace(200, 2000, 12)[:, None, None]
    x = (0.3 * torch.sin(2 * torch.pi * pitch * time)).repeat(1, 2, 1)
    same, little, much = (distance(x + level * noise(12), x) for level in (0.0, 0.02, 0.5))
    assert same == pytest.approx(0, abs=1e-2)
    assert same < little < much


def test_features_of_an_integer_number_of_windows() -> None:
    features = SpeechEmbedding(RATE)
    assert features(noise(2)).shape == (2, 1, 96)
    assert features(noise(1, 2 * RATE)).shape == (1, 4, 96)
    assert len(pickle.loads(pickle.dumps(copy.deepcopy(features)))(noise(1))) == 1
    with refused("metrics.too-short", "0.50", "0.8", "validation_length"):
        features(noise(1, RATE // 2))


def test_missing_packages_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *others: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real(name, *others)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    with refused("metrics.package", "onnxruntime", "owl-platform[audio]", "frechet"):
        FrechetAudioDistance(RATE)
    monkeypatch.undo()
    monkeypatch.setattr(module, "distribution", lambda name: (_ for _ in ()).throw(module.PackageNotFoundError(name)))
    with refused("metrics.package", "openwakeword", "frechet"):
        FrechetAudioDistance(RATE)


def test_all_metrics_together() -> None:
    metrics = AudioMetrics(RATE, frechet=True)
    metrics.update((noise() + 0.1 * noise(seed=1)).bfloat16(), noise())
    values = {name: metric.compute() for name, metric in metrics.named("val").items()}
    names = ["si_sdr", "snr", "stft", "mel", "silence_level", "fd_speech_embedding"]
    assert list(values) == [f"val/{name}" for name in names]
    assert all(bool(value.isfinite()) for value in values.values())
    assert list(AudioMetrics(RATE).named("val")) == [f"val/{name}" for name in names[:-1]]
