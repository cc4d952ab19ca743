"""The decoder as a network of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from owl import models
from owl.latents import UNKNOWN, encoder_of, identifies_encoder
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.image_decoder import ImageDecoder, decode_clips
from tests.helpers.errors import refused

TINY: dict[str, Any] = {"size": (16, 24), "latent_size": (4, 6), "widths": [8, 16], "blocks": [1, 1]}


@pytest.fixture
def autoencoder() -> ImageAutoencoder:
    torch.manual_seed(0)
    network = ImageAutoencoder(**TINY, decoder_blocks=[2, 1])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("folded", [False, True])
def test_a_copy_of_an_autoencoders_decoder_has_its_outputs(autoencoder: ImageAutoencoder, folded: bool) -> None:
    latent = torch.randn(2, 4, 4, 6)
    expected = autoencoder.decode(latent)
    decoder = ImageDecoder.of(autoencoder.fold_weight_norm() if folded else autoencoder)
    torch.testing.assert_close(decoder.decode(latent), expected)
    with torch.no_grad():
        decoder.decoder.head.bias.add_(1.0)  # a copy
    torch.testing.assert_close(autoencoder.decode(latent), expected)


def test_a_copy_of_an_autoencoders_decoder_identifies_its_latents(autoencoder: ImageAutoencoder) -> None:
    autoencoder.latent_mean.copy_(torch.arange(4))
    autoencoder.latent_std.copy_(torch.arange(1, 5))
    decoder = ImageDecoder.of(autoencoder)
    assert encoder_of(decoder) == encoder_of(autoencoder)
    assert torch.equal(decoder.latent_mean, autoencoder.latent_mean)
    assert torch.equal(decoder.latent_std, autoencoder.latent_std)


def test_an_export_decodes_the_same_and_identifies_its_latents(autoencoder: ImageAutoencoder, tmp_path: Path) -> None:
    decoder = ImageDecoder(**ImageDecoder.of(autoencoder).config)
    assert identifies_encoder(decoder)
    assert encoder_of(decoder) == UNKNOWN
    decoder.latent_encoder.copy_(torch.arange(1, 9))
    models.save(decoder, tmp_path)
    loaded = models.load(tmp_path)
    latent = torch.randn(1, 4, 4, 6)
    assert torch.equal(loaded(latent), decoder(latent))
    assert encoder_of(loaded) == encoder_of(decoder) == "0102030405060708"


def test_latents_of_another_shape_are_refused(autoencoder: ImageAutoencoder) -> None:
    decoder = ImageDecoder.of(autoencoder)
    for shape in ((1, 4, 6, 4), (1, 3, 4, 6), (4, 4, 6)):
        with refused("network.input", str(list(shape)), "[batch, 4, 4, 6]"):
            decoder.decode(torch.zeros(shape))
    with refused("network.arguments", "latent_channels", "5"):
        ImageDecoder(3, (16, 24), (4, 6), 5, widths=[8, 16], blocks=[1, 1])


@pytest.mark.parametrize("size", [(16, 24), (18, 20)])
def test_a_previous_frame_changes_nothing_until_it_is_learnt(
    autoencoder: ImageAutoencoder, size: tuple[int, int]
) -> None:
    if size != autoencoder.size:
        autoencoder = ImageAutoencoder(**TINY | {"size": size})
    decoder = ImageDecoder.of(autoencoder, previous=True)
    assert ImageDecoder(**decoder.config).previous
    latent, previous = torch.randn(2, 4, 4, 6), 2 * torch.randn(2, 3, *size)
    expected = ImageDecoder.of(autoencoder).decode(latent)
    assert torch.equal(decoder.decode(latent), expected)
    assert torch.equal(decoder.decode(latent, previous), expected)
    decoder.decode(latent, previous).square().sum().backward()
    with torch.no_grad():
        decoder.hint.weight -= 0.1 * decoder.hint.weight.grad
    changed = decoder.decode(latent, previous)
    assert not torch.allclose(changed, expected)
    assert torch.equal(changed, decoder.decode(latent, previous.clamp(-1, 1)))
    assert torch.equal(decoder.decode(latent), expected)


def test_a_clip_is_decoded_with_the_decoders_own_frames(autoencoder: ImageAutoencoder) -> None:
    latents = torch.randn(2, 3, 4, 4, 6)
    plain = ImageDecoder.of(autoencoder)
    assert torch.equal(decode_clips(plain, latents).flatten(0, 1), plain.decode(latents.flatten(0, 1)))
    decoder = ImageDecoder.of(autoencoder, previous=True)
    torch.nn.init.normal_(decoder.hint.weight, std=0.1)
    found = decode_clips(decoder, latents)
    expected = None
    for frame in range(3):
        expected = decoder.decode(latents[:, frame], expected)
        assert torch.equal(found[:, frame], expected)
    assert torch.equal(decode_clips(decoder.eval(), latents[:, :1]), found[:, :1])
    with refused("network.input", "1 frame", "data.init_args.length"):
        decode_clips(decoder.train(), latents[:, :1])
    latents.requires_grad_()
    (gradient,) = torch.autograd.grad(decode_clips(decoder, latents)[:, -1].sum(), latents)
    assert [bool(gradient[:, frame].any()) for frame in range(3)] == [False, False, True]


def test_a_previous_frame_that_does_not_fit_is_refused(autoencoder: ImageAutoencoder) -> None:
    latent, previous = torch.zeros(1, 4, 4, 6), torch.zeros(1, 3, 16, 24)
    with refused("network.input", "[1, 3, 16, 24]", "previous"):
        ImageDecoder.of(autoencoder).decode(latent, previous)
    for other in (previous[..., :20], previous[:, :1], previous.expand(2, 3, 16, 24)):
        with refused("network.input", str(list(other.shape)), "[1, 3, 16, 24]"):
            ImageDecoder.of(autoencoder, previous=True).decode(latent, other)
