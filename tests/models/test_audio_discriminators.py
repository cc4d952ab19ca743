"""Discriminators of sound: the authors' own numbers, what each network sees, exports and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from owl import models
from owl.losses.adversarial import OBJECTIVES
from owl.losses.feature_matching import feature_matching
from owl.models.audio_discriminators import (
    AudioDiscriminator,
    CombinedDiscriminator,
    Judgement,
    MultiPeriodDiscriminator,
    MultiScaleSTFTDiscriminator,
)
from tests.helpers.errors import refused

STFT = {"channels": 2, "fft_sizes": [64, 16], "width": 4}
PERIODS = {"channels": 2, "periods": [2, 3], "widths": [4, 8, 8]}
any_kind = pytest.mark.parametrize(
    ("kind", "arguments"), [(MultiScaleSTFTDiscriminator, STFT), (MultiPeriodDiscriminator, PERIODS)]
)


def build(kind: type[AudioDiscriminator], arguments: dict[str, Any]) -> AudioDiscriminator:
    torch.manual_seed(0)
    return kind(**arguments)


def sound(samples: int = 200) -> Tensor:
    return 0.1 * torch.randn(3, 2, samples, generator=torch.Generator().manual_seed(1))


def test_it_gives_the_numbers_of_stable_audio_tools() -> None:
    """Scores, losses and gradients of EncodecDiscriminator, run unchanged by its authors' code (source in the file)."""
    known = json.loads((Path(__file__).parent / "stable_audio_encodec.json").read_text(encoding="utf-8"))
    network = MultiScaleSTFTDiscriminator(1, known["settings"]["n_ffts"], known["settings"]["filters"]).double()
    for scale in network.networks:
        for layer in scale.layers[1:4]:
            layer.stride = (1, 1)  # their code leaves out the stride of the paper
    named = {}
    for name, values in known["parameters"].items():
        scale, layer, *_, kind = name.replace("convs.", "layers.").replace("conv_post", "head").split(".")
        layer = layer if layer == "head" else f"layers.{name.split('.')[2]}"
        kind = {"bias": "bias", "weight_g": "parametrizations.weight.original0"}.get(
            kind, "parametrizations.weight.original1"
        )
        named[name] = network.get_parameter(f"networks.{scale}.{layer}.{kind}")
        with torch.no_grad():
            named[name].copy_(torch.tensor(values, dtype=torch.float64).view_as(named[name]))
    assert len(named) == len(list(network.parameters()))
    fakes = torch.tensor(known["fakes"], dtype=torch.float64, requires_grad=True)
    real, fake = (network(audio) for audio in (torch.tensor(known["reals"], dtype=torch.float64), fakes))
    for scale, logits in zip(known["logits_fake"], (judged.logits for judged in fake), strict=True):
        assert logits[0, 3].tolist() == pytest.approx(scale, rel=1e-5)
    hinge, pairs = OBJECTIVES["hinge"], list(zip(real, fake, strict=True))
    for_discriminator = sum(hinge.discriminator(r.logits, f.logits) for r, f in pairs) / 2
    adversarial = sum(hinge.generator(f.logits, r.logits) for r, f in pairs) / 2
    features = feature_matching([judged.features for judged in fake], [judged.features for judged in real])
    for name, loss in (
        ("discriminator_loss", for_discriminator),
        ("adversarial_loss", adversarial),
        ("feature_matching", features),
    ):
        assert loss.item() == pytest.approx(known[name], rel=1e-6)
    gradients = torch.autograd.grad(for_discriminator, list(named.values()), retain_graph=True)
    norms = {name: float(gradient.norm()) for name, gradient in zip(named, gradients, strict=True)}
    assert norms == pytest.approx(known["norms_of_discriminator_gradients"], rel=1e-4, abs=1e-9)
    for name, loss in (("adversarial_loss", adversarial), ("feature_matching", features)):
        (gradient,) = torch.autograd.grad(loss, fakes, retain_graph=True)
        expected = torch.tensor(known[f"{name}_to_fakes"], dtype=torch.float64)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@any_kind
def test_every_network_has_logits_and_features_and_every_weight_learns(kind: Any, arguments: dict[str, Any]) -> None:
    network = build(kind, arguments)
    judged = network(sound())
    assert len(judged) == 2
    for one in judged:
        assert isinstance(one, Judgement)
        assert one.logits.shape[0] == 3
        assert len(one.features) == (5 if kind is MultiScaleSTFTDiscriminator else 3)
        assert all(0.05 < feature.square().mean().sqrt() < 3 for feature in one.features)  # neither fades nor explodes
    sum(one.logits.square().mean() for one in judged).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


@any_kind
def test_samples_of_a_batch_are_judged_alone_and_in_any_precision(kind: Any, arguments: dict[str, Any]) -> None:
    network = build(kind, arguments)
    whole, alone = network(sound()), network(sound()[1:2])
    for a, b in zip(whole, alone, strict=True):
        torch.testing.assert_close(a.logits[1:2], b.logits, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(whole, network(sound()), strict=True):
            assert b.logits.dtype == torch.float32
            assert (a.logits - b.logits).abs().max() < 0.1 * a.logits.abs().max()


def test_the_spectrogram_is_complex_so_polarity_and_phase_are_seen() -> None:
    network = build(MultiScaleSTFTDiscriminator, STFT)
    audio = sound()
    spectrogram = network.networks[0].spectrogram(audio)  # type: ignore[operator]
    assert spectrogram.shape == (3, 4, (200 - 64) // 16 + 1, 33)
    torch.testing.assert_close(network.networks[0].spectrogram(-audio), -spectrogram)  # type: ignore[operator]
    noise = torch.randn(1, 2, 50_000, generator=torch.Generator().manual_seed(0))
    for scale in network.networks:  # white noise has its own level in every transform
        level = 2 * scale.spectrogram(noise).square().mean()  # type: ignore[operator]
        assert float(level) == pytest.approx(1, rel=0.05)
    for a, b in zip(network(audio), network(-audio), strict=True):
        assert (a.logits - b.logits).abs().max() > 1e-2


def test_a_period_sees_only_the_samples_that_are_a_period_apart() -> None:
    network = build(MultiPeriodDiscriminator, PERIODS | {"periods": [5]})
    audio = sound(195).requires_grad_()
    logits = network(audio)[0].logits
    assert logits.shape[2] == 5
    logits[:, :, 3].sum().backward()
    touched = audio.grad.abs().sum((0, 1)) > 0
    assert touched[3::5].all()
    assert touched.sum() == len(touched[3::5])


def test_sound_of_any_length_is_judged_to_its_last_sample() -> None:
    network = build(MultiPeriodDiscriminator, PERIODS)
    audio = sound(200).requires_grad_()
    sum(one.logits.square().sum() for one in network(audio)).backward()
    assert (audio.grad.abs().sum((0, 1)) > 0).all()


def test_both_kinds_judge_together() -> None:
    options = {"channels": 2, "fft_sizes": [64, 16], "width": 4, "periods": [2, 3], "period_widths": [4, 8]}
    network = build(CombinedDiscriminator, options)
    assert network.config == options
    assert [len(judged.features) for judged in network(sound())] == [5, 5, 2, 2]
    with refused("network.input", "at least 64 samples"):
        network(sound(63))


@any_kind
def test_the_configuration_rebuilds_the_network_as_an_export_does(
    kind: Any, arguments: dict[str, Any], tmp_path: Path
) -> None:
    network = build(kind, arguments)
    models.save(network, tmp_path)
    twin = models.load(tmp_path)
    assert twin.config == network.config == arguments
    for a, b in zip(network(sound()), twin(sound()), strict=True):
        torch.testing.assert_close(a.logits, b.logits)


@pytest.mark.parametrize(("kind", "millions"), [(MultiScaleSTFTDiscriminator, 0.481), (MultiPeriodDiscriminator, 41.1)])
def test_the_defaults_are_those_of_the_papers(kind: Any, millions: float) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in kind().parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (MultiScaleSTFTDiscriminator, {"channels": 0}, "channels is [0]"),
        (MultiScaleSTFTDiscriminator, {"fft_sizes": []}, "fft_sizes is []"),
        (MultiScaleSTFTDiscriminator, {"fft_sizes": [64, 2]}, "fft_sizes is [64, 2]"),
        (MultiScaleSTFTDiscriminator, {"width": 0}, "width is [0]"),
        (MultiPeriodDiscriminator, {"periods": [2, 0]}, "periods is [2, 0]"),
        (MultiPeriodDiscriminator, {"widths": []}, "widths is []"),
    ],
)
def test_impossible_arguments_are_refused_by_name(kind: Any, arguments: dict[str, Any], words: str) -> None:
    with refused("network.arguments", words):
        kind(**arguments)


@any_kind
@pytest.mark.parametrize("shape", [(1, 2, 1), (1, 1, 200), (2, 200), (1, 2, 0)])
def test_sound_that_cannot_be_judged_is_refused(kind: Any, arguments: dict[str, Any], shape: tuple[int, ...]) -> None:
    with refused("network.input", str(list(shape)), "[batch, 2, samples]", "length"):
        build(kind, arguments)(torch.zeros(shape))
