"""What recipes of decoders share."""

from pathlib import Path

import torch

from owl import models
from owl.losses.lpips import LPIPS
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.image_decoder import ImageDecoder
from owl.recipes.decoders import DecoderMetrics, built, clips, flow_of, latents, load_autoencoder, with_noise
from tests.helpers.errors import refused


def test_a_decoder_takes_its_geometry_from_the_autoencoder(tmp_path: Path) -> None:
    models.save(ImageAutoencoder(size=(16, 24), latent_size=(4, 6), widths=[8, 16], blocks=[1, 1]), tmp_path)
    decoder = built(
        lambda *geometry: ImageDecoder(*geometry, widths=[16], blocks=[1], patch=4), load_autoencoder(str(tmp_path))
    )
    assert decoder(torch.zeros(1, 4, 4, 6)).shape == (1, 3, 16, 24)
    models.save(decoder, tmp_path)
    with refused("network.kind", str(tmp_path), "ImageDecoder", "ImageAutoencoder"):
        load_autoencoder(str(tmp_path))


def test_latents_are_flattened_like_images_or_refused() -> None:
    latent = torch.randn(2, 3, 4, 5, 6)
    assert torch.equal(latents({"latent": latent})[4], latent[1, 1])
    for batch in ({}, {"latent": latent[0]}, {"latent": latent.long()}):
        with refused("recipe.dataset", "latent", "FrozenEncoder"):
            latents(batch)


def test_pairs_of_frames_need_flow() -> None:
    flow = torch.zeros(2, 3, 2, 4, 6)
    assert flow_of({"flow": flow}) is flow
    for batch in ({}, {"flow": flow[:, :1]}, {"flow": flow[0]}):
        with refused("recipe.dataset", "flow", "data.init_args.length"):
            flow_of(batch)


def test_the_first_window_is_a_clip_if_it_is_long_enough() -> None:
    frames = torch.linspace(-1, 1, 8).view(8, 1, 1, 1).expand(8, 3, 8, 480)
    (clip,) = clips({"truth": frames, "decoded": frames}, 4).values()
    assert [frame[-1, 0, 0].item() for frame in clip] == [0, 36, 73, 109]
    assert clips({"truth": frames, "decoded": frames}, 2) == {}


def test_noise_has_the_wanted_strength_in_every_channel() -> None:
    torch.manual_seed(0)
    latent, std = torch.zeros(4000, 2, 3, 3), torch.tensor([1.0, 10.0])
    assert with_noise(latent, std, 0.0) is latent
    noisy = with_noise(latent, std, 0.6)
    found = noisy.square().mean((0, 2, 3))
    torch.testing.assert_close(found, 0.6**2 / 3 * std.square(), rtol=0.05, atol=0)  # E[s^2] of U(0, 0.6)
    levels = noisy[:, 0].flatten(1).std(1)
    assert levels.min() < 0.1 < 0.5 < levels.max()  # a level of its own for each sample


def test_flicker_is_measured_where_there_is_flow_between_frames() -> None:
    torch.manual_seed(0)
    image = torch.rand(4, 3, 32, 48) * 2 - 1
    metrics = DecoderMetrics(LPIPS())
    metrics.update(image, image, None)
    metrics.update(image, image, torch.zeros(4, 1, 2, 8, 12))
    assert not any("flicker" in name for name in metrics.named("val"))
    metrics.update(image + 0.2 * torch.randn_like(image), image, torch.zeros(2, 2, 2, 8, 12))
    found = {name: metric.compute() for name, metric in metrics.named("val").items()}
    assert found["val/flicker"] > 0
    assert found["val/psnr"] > 20
