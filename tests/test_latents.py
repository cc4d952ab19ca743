"""A network proves of which encoder its latents are, with the encoder and without it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from owl import models
from owl.latents import UNKNOWN, check_decoder, check_encoder, encoder_of, load_latent_stats
from owl.models.image_autoencoder import ImageAutoencoder
from tests.helpers.decoders import LatentDecoder
from tests.helpers.errors import refused
from tests.helpers.latents import FINGERPRINT, lively, streams
from tests.helpers.shards import DESCRIPTIONS

OTHER = "ff00112233445566"


def described(fingerprint: str = FINGERPRINT, **changes: Any) -> dict[str, dict[str, Any]]:
    latent = {"shape": [2, 4, 6], "mean": [1.0, 2.0], "std": [3.0, 4.0], "encoder": {"fingerprint": fingerprint}}
    return {"latent": latent | changes}


def decoder_of(fingerprint: str = FINGERPRINT) -> LatentDecoder:
    decoder = LatentDecoder((2, 4, 6))
    load_latent_stats(decoder, described(fingerprint), "data")
    return decoder


def world(fingerprint: str = FINGERPRINT) -> nn.Module:
    network = lively()
    network.video_encoder.copy_(torch.tensor(list(bytes.fromhex(fingerprint))))
    return network


def test_an_exported_decoder_identifies_its_latents_without_the_encoder(tmp_path: Path) -> None:
    models.save(decoder_of(), tmp_path)
    decoder = models.load(tmp_path)
    assert encoder_of(decoder) == FINGERPRINT
    assert decoder.latent_mean.tolist() == [1.0, 2.0]
    assert decoder.latent_std.tolist() == [3.0, 4.0]
    check_encoder(decoder, described(), "data")
    check_decoder(world(), "video", decoder)
    with refused("latents.encoder", "other", "LatentDecoder", OTHER, FINGERPRINT):
        check_encoder(decoder, described(OTHER), "other")
    with refused("latents.encoder", "video decoder", OTHER, FINGERPRINT):
        check_decoder(world(OTHER), "video", decoder)


def test_a_decoder_without_statistics_fits_no_network() -> None:
    with refused("latents.encoder", "video decoder", UNKNOWN):
        check_decoder(world(UNKNOWN), "video", LatentDecoder((2, 4, 6)))


def test_an_autoencoder_proves_it_by_the_encoder_that_it_carries() -> None:
    autoencoder = ImageAutoencoder(size=(16, 24), latent_size=(4, 6), latent_channels=2, widths=[8, 16], blocks=[1, 1])
    check_decoder(world(models.fingerprint(autoencoder.encoder)), "video", autoencoder)
    with refused("latents.encoder", models.fingerprint(autoencoder.encoder), FINGERPRINT):
        check_decoder(world(), "video", autoencoder)


def test_a_world_model_is_refused_on_latents_of_another_delay(tmp_path: Path) -> None:
    given = {"shape": [1, 4, 6], "mean": [0.0], "std": [1.0], "encoder": {"fingerprint": FINGERPRINT}}
    earlier = described() | {"conditioning_latent": given | {"delay": 2.0}, "controls": DESCRIPTIONS["controls"]}
    network = lively(**streams("conditioning"))
    load_latent_stats(network, earlier, "data")
    models.save(network, tmp_path)
    exported = models.load(tmp_path)
    check_encoder(exported, earlier, "data")
    with refused("latents.delay", "conditioning_latent of other", "0 s earlier", "2 s earlier", "--depth_delay 2"):
        check_encoder(exported, described() | {"conditioning_latent": given}, "other")
    check_encoder(decoder_of(), described(delay=2.0), "data")  # only world models have a delay


@pytest.mark.parametrize("decoder", [nn.Linear(1, 1), LatentDecoder()])
def test_a_decoder_of_a_stream_is_known_by_the_name_of_its_latents(decoder: nn.Module) -> None:
    with refused("decoder.kind", type(decoder).__name__, "audio_latent_encoder"):
        check_decoder(lively(**streams("audio")), "audio", decoder)


def test_latents_of_another_shape_are_refused() -> None:
    with refused("latents.shape", "latent of data", "[4, 4, 6]", "[2, 4, 6]"):
        load_latent_stats(LatentDecoder((4, 4, 6)), described(), "data")


def test_tokens_at_a_rate_of_their_own_are_refused() -> None:
    with refused("latents.shape", "latent of data", "21.5 tokens", "[2, 4, 6]", "10.75 frames", "sample_rate / hop"):
        load_latent_stats(LatentDecoder((2, 4, 6)), described(shape=[2], rate=21.5), "data")
