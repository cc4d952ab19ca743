"""The audio autoencoder: geometry, spans, streams, initialisation, bad input, and its exchange format."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from owl import models
from owl.latents import encoder_of
from owl.models.audio_autoencoder import INITIAL_LOGVAR, AudioAutoencoder
from owl.models.audio_decoder import AudioDecoder
from tests.helpers.errors import refused


def tiny(**changes: Any) -> AudioAutoencoder:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"strides": [3, 5], "widths": [4, 6, 8], "latent_channels": 3}
    return AudioAutoencoder(**(arguments | changes))


def randomise(network: nn.Module) -> nn.Module:
    """Move every parameter off its initial value, so that zero-initialised branches take part."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def sound(samples: int, batch: int = 1, channels: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, channels, samples) * 0.1


@pytest.mark.parametrize(
    "changes", [{}, {"channels": 1}, {"causal": True}, {"norm": "none"}, {"strides": [2, 3, 7], "widths": [4] * 4}]
)
@pytest.mark.parametrize("samples", [1, 420, 421])
def test_any_length_is_reconstructed_and_every_parameter_learns(changes: dict[str, Any], samples: int) -> None:
    network = randomise(tiny(**changes))
    x = sound(samples, 2, network.channels)
    reconstruction, posterior = network(x, sample=True)
    (reconstruction.square().mean() + posterior.kl()).backward()
    assert reconstruction.shape == x.shape
    assert posterior.mean.shape == (2, 3, -(-samples // network.hop))
    assert posterior.logvar.shape == (2, 1, -(-samples // network.hop))
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_hop_is_the_product_of_the_strides() -> None:
    assert tiny().hop == 15
    with torch.device("meta"):
        network = AudioAutoencoder()
    assert (network.hop, network.sample_rate / network.hop) == (735, 60)
    assert network.tsr == 2 * 735 / 64


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("k", [20, 21])
def test_a_latent_depends_on_its_span(causal: bool, k: int) -> None:
    network = randomise(tiny(causal=causal)).double()
    x = sound(40 * network.hop).double().requires_grad_()
    network.encode(x).mean[..., k].sum().backward()
    assert x.grad is not None
    heard = x.grad.abs().sum((0, 1)).nonzero().flatten()
    first, last = network.span(k)
    assert (int(heard[0]), int(heard[-1])) == (max(first, 0), last)
    assert first < k * network.hop
    assert last == (k + 1) * network.hop - 1 if causal else last > (k + 1) * network.hop


@pytest.mark.parametrize("causal", [False, True])
def test_samples_depend_on_their_context(causal: bool) -> None:
    network = randomise(tiny(causal=causal)).double()
    latent = torch.randn(1, 3, 80).double().requires_grad_()
    k, (before, after) = 50, network.context()
    network.decode(latent)[..., k * network.hop : (k + 1) * network.hop].sum().backward()
    assert latent.grad is not None
    used = latent.grad.abs().sum((0, 1)).nonzero().flatten()
    assert (int(used[0]), int(used[-1])) == (k - before, k + after)
    assert (after == 0) == causal


@pytest.mark.parametrize("causal", [False, True])
@settings(max_examples=12)
@given(first=st.integers(0, 119), length=st.integers(1, 40))
def test_a_chunk_with_its_context_equals_the_whole(causal: bool, first: int, length: int) -> None:
    network = randomise(tiny(causal=causal))
    latent = torch.randn(1, 3, 120, generator=torch.Generator().manual_seed(3))
    before, after = network.context()
    last, start = min(120, first + length), max(0, first - before)
    with torch.no_grad():
        whole, chunk = network.decode(latent), network.decode(latent[..., start : last + after])
    inside = chunk[..., (first - start) * network.hop :][..., : (last - first) * network.hop]
    assert (inside - whole[..., first * network.hop : last * network.hop]).abs().max() <= 1e-5


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 7, 90])
def test_a_stream_equals_the_whole(causal: bool, length: int) -> None:
    network = randomise(tiny(causal=causal)).eval()
    latent = torch.randn(2, 3, 90)
    with torch.inference_mode():
        stream, chunks = network.stream(), latent.split(length, -1)
        samples = [stream(chunk, last=n == len(chunks) - 1) for n, chunk in enumerate(chunks)]
        assert (torch.cat(samples, -1) - network.decode(latent)).abs().max() <= 1e-5
    assert not causal or [part.shape[-1] for part in samples] == [chunk.shape[-1] * 15 for chunk in chunks]


def test_the_level_of_sound_passes_at_initialisation() -> None:
    network = tiny(widths=[32, 32, 32], latent_channels=16)
    mean = network.encode(sound(4800)).mean
    assert 0.5 < mean.std() < 2
    assert 0.03 < network.decode(torch.randn(1, 16, 400)).std() < 0.3
    assert torch.allclose(network.encode(sound(48)).logvar, torch.tensor(INITIAL_LOGVAR), atol=0.15)


@pytest.mark.parametrize("channels", [1, 2])
def test_low_notes_pass_before_the_first_step(channels: int) -> None:
    network = tiny(channels=channels, strides=[5, 6], latent_channels=8 * channels)
    time = torch.arange(3000) / network.sample_rate
    notes = [torch.sin(2 * torch.pi * hertz * time) * 0.1 for hertz in (200, 3000, 12_000)]
    low, middle, high = torch.stack([torch.stack([note, -0.5 * note])[:channels] for note in notes])
    errors = [network(x[None], sample=False)[0].sub(x).square().sum() / x.square().sum() for x in (low, middle, high)]
    assert errors[0] < 1e-3
    assert errors[1] < 0.1
    assert errors[2] > 0.8


def test_silence_stays_finite() -> None:
    network = tiny()
    reconstruction, posterior = network(torch.zeros(1, 2, 100), sample=False)
    posterior.kl().backward()
    assert bool(reconstruction.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)


def test_folding_keeps_outputs_and_fingerprint() -> None:
    network = randomise(tiny())
    x, before = sound(480), models.fingerprint(network)
    expected = network(x, sample=False)[0]
    assert network.fold_weight_norm().config["norm"] == "none"
    torch.testing.assert_close(network(x, sample=False)[0], expected, rtol=1e-4, atol=1e-6)
    assert models.fingerprint(network) == before


def test_an_export_has_the_same_outputs(tmp_path: Path) -> None:
    network = randomise(tiny(causal=True))
    models.save(network, tmp_path)
    loaded = models.load(tmp_path)
    assert isinstance(loaded, AudioAutoencoder)
    assert torch.equal(loaded(sound(99), sample=False)[0], network(sound(99), sample=False)[0])
    assert models.fingerprint(loaded.encoder) == models.fingerprint(network.encoder)


def test_a_decoder_of_its_own_knows_its_encoder(tmp_path: Path) -> None:
    network = randomise(tiny())
    network.latent_mean.fill_(0.5)
    decoder = AudioDecoder.of(network)
    latent = torch.randn(1, 3, 9)
    assert torch.equal(decoder(latent), network.decode(latent))
    assert decoder.context() == network.context()
    assert torch.equal(decoder.stream()(latent, last=True), network.decode(latent))
    assert encoder_of(decoder, "audio_latent") == encoder_of(network)
    models.save(decoder, tmp_path)
    loaded = models.load(tmp_path)
    assert torch.equal(loaded.audio_latent_mean, network.latent_mean)
    assert encoder_of(loaded, "audio_latent") == encoder_of(network)


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"strides": []}, ["strides", "2"]),
        ({"strides": [1, 2, 3]}, ["[1, 2, 3]", "2"]),
        ({"widths": [4, 4]}, ["[4, 4]", "3"]),
        ({"widths": [4, 0, 4]}, ["widths"]),
        ({"latent_channels": 0}, ["latent_channels"]),
        ({"norm": "group"}, ["group", "weight"]),
    ],
)
def test_impossible_arguments_are_reported(changes: dict[str, Any], tokens: list[str]) -> None:
    with refused("network.arguments", *tokens):
        tiny(**changes)


def test_other_inputs_are_reported() -> None:
    network = tiny()
    for shape in ([1, 1, 50], [2, 50], [1, 2, 0]):
        with refused("network.input", str(shape), "2"):
            network.encode(torch.zeros(shape))
    for shape in ([1, 4, 50], [3, 50], [1, 3, 0]):
        with refused("network.input", str(shape), "3"):
            network.decode(torch.zeros(shape))
