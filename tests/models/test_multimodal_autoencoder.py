"""One latent for several modalities: widened without a change, encoded from any of them, bound to its scales."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from owl import models
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.multimodal_autoencoder import MultimodalAutoencoder
from owl.pixels import UNKNOWN
from tests.helpers.errors import refused
from tests.helpers.shards import DESCRIPTIONS

SHAPE: dict[str, Any] = {
    "size": (24, 48),  # a grid of 32x48: with learned resizing at both ends
    "latent_size": (4, 6),
    "latent_channels": 4,
    "widths": [8, 16, 16],
    "blocks": [1, 1, 1],
}
ALL = ["rgb", "depth", "flow"]


def network(modalities: list[str] = ALL, seed: int = 0, **options: Any) -> MultimodalAutoencoder:
    torch.manual_seed(seed)
    made = MultimodalAutoencoder(modalities, **{**SHAPE, **options})
    made.read_scales(DESCRIPTIONS, "data/x")
    return made


def sample(count: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rgb, depth = (torch.rand(count, channels, 24, 48, generator=generator) for channels in (3, 1))
    return rgb * 2 - 1, depth, torch.randn(count, 2, 12, 24, generator=generator)


def trained(made: torch.nn.Module) -> torch.nn.Module:
    """Move every weight from where it was initialised."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.mark.parametrize("norm", ["weight", "group", "none"])
def test_a_widened_autoencoder_gives_the_same_latents_and_pictures(norm: str) -> None:
    torch.manual_seed(1)
    narrow = trained(ImageAutoencoder(3, **SHAPE, norm=norm)).double()
    narrow.latent_std.fill_(3)
    wide = network(norm=norm, seed=2).double()
    wide.widen(narrow, "narrow.ckpt")
    rgb, depth, flow = (part.double() for part in sample())
    latent = narrow.encode(rgb).mean
    for others in ((depth, flow), (None, None), (1 - depth, -flow)):
        posterior = wide.encode(rgb, *others)
        torch.testing.assert_close(posterior.mean, latent, atol=1e-12, rtol=0)
        torch.testing.assert_close(posterior.logvar, narrow.encode(rgb).logvar, atol=1e-12, rtol=0)
    torch.testing.assert_close(wide.decode(latent), narrow.decode(latent), atol=1e-12, rtol=0)
    assert torch.equal(wide.latent_std, narrow.latent_std)
    reconstruction, _ = wide(wide.picture(rgb, depth, flow), sample=False)
    assert reconstruction[:, 3:].std() > 0.01  # the new ones are not dead
    reconstruction.square().sum().backward()
    stem = wide.encoder.stem
    weight = stem.parametrizations.weight.original1 if norm == "weight" else stem.weight
    assert weight.grad[:, 3 * wide.encoder.patch**2 :].abs().max() > 0


def test_single_precision_widens_to_rounding() -> None:
    torch.manual_seed(1)
    narrow = trained(ImageAutoencoder(3, **SHAPE))
    wide = network(seed=2)
    wide.widen(narrow, "narrow.ckpt")
    rgb, depth, flow = sample()
    reconstruction = wide.decode(wide.encode(rgb, depth, flow).mean)
    torch.testing.assert_close(reconstruction, narrow(rgb, False)[0], atol=2e-6, rtol=0)


def test_four_channels_are_widened_to_seven() -> None:
    four = trained(network(["rgb", "depth"]))
    seven = network(seed=3)
    seven.widen(four, "four.ckpt")
    rgb, depth, flow = sample()
    latent = four.encode(rgb, depth).mean
    torch.testing.assert_close(seven.encode(rgb, depth, flow).mean, latent, atol=2e-6, rtol=0)
    torch.testing.assert_close(seven.decode_picture(latent)[:, :4], four.decode_picture(latent), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("source", "token"),
    [
        (lambda: ImageAutoencoder(3, **{**SHAPE, "latent_channels": 8}), "latent_channels"),
        (lambda: ImageAutoencoder(7, **SHAPE), "modalities"),
        (lambda: network(["rgb", "flow"]), "modalities"),
        (lambda: torch.nn.Linear(1, 1), "latent_size"),
    ],
)
def test_only_the_same_architecture_is_widened(source: Any, token: str) -> None:
    with refused("recipe.start", "other.ckpt", token):
        network().widen(source(), "other.ckpt")


def test_what_is_left_out_is_unknown() -> None:
    made, (rgb, depth, flow) = trained(network()), sample()
    picture = made.picture(rgb, depth, flow)
    assert picture.shape == (2, 7, 24, 48)
    assert torch.equal(made.rgb_only(picture), made.picture(rgb))
    assert torch.equal(made.picture(rgb, None, flow)[:, 3], torch.full((2, 24, 48), UNKNOWN))
    assert torch.equal(made.picture(rgb, torch.zeros_like(depth), flow), made.picture(rgb, None, flow))
    alone, without_flow, whole = (made.encode(rgb, *others).mean for others in ((), (depth, None), (depth, flow)))
    assert min((alone - without_flow).abs().max(), (whole - without_flow).abs().max()) > 1e-3


def test_values_are_distances_and_pixels() -> None:
    made, (rgb, _, flow) = network(), sample()
    flow = torch.nn.functional.interpolate(flow, (24, 48), mode="bilinear")
    depth = torch.full((2, 1, 24, 48), 100 / 255)
    values = made.values(made.picture(rgb, depth, flow))
    torch.testing.assert_close(values["rgb"], rgb)
    torch.testing.assert_close(values["depth"], torch.full_like(depth, (100 + 1.2) * 7.143), rtol=1e-4, atol=0)
    torch.testing.assert_close(values["flow"], flow, rtol=1e-4, atol=1e-4)
    latent = made.encode(rgb).mean
    assert torch.equal(made.decode(latent), made.decode_picture(latent)[:, :3])


def test_scales_are_part_of_the_export(tmp_path: Path) -> None:
    made = network()
    models.save(made, tmp_path)
    loaded = models.load(tmp_path)
    assert loaded.depth_scale == made.depth_scale
    assert loaded.flow_scale == 0.1
    parts = sample()
    torch.testing.assert_close(loaded.encode(*parts).mean, made.encode(*parts).mean)


def test_other_scales_and_missing_modalities_are_refused() -> None:
    made = network()
    made.read_scales(DESCRIPTIONS, "data/x")  # again
    other = DESCRIPTIONS | {"flow": DESCRIPTIONS["flow"] | {"scale": 0.2}}
    with refused("network.scale", "data/other", "flow_scale", "0.2", "0.1"):
        made.read_scales(other, "data/other")
    other = DESCRIPTIONS | {"depth": DESCRIPTIONS["depth"] | {"offset": 2.0}}
    with refused("network.scale", "data/other", "depth_scale", "2.0", "1.2"):
        made.read_scales(other, "data/other")
    with refused("dataset.modalities", "data/sound", "has no depth", "rgb, audio"):
        made.read_scales({name: DESCRIPTIONS[name] for name in ("rgb", "audio")}, "data/sound")
    with refused("network.scale", "depth_scale"):
        MultimodalAutoencoder(**SHAPE).encode(*sample())


def test_impossible_arguments_and_inputs_are_refused() -> None:
    with refused("network.arguments", "['depth', 'flow']", "[rgb, depth, flow]"):
        MultimodalAutoencoder(["depth", "flow"], **SHAPE)
    made, (rgb, depth, flow) = network(), sample()
    for parts, token in (
        ((rgb[:, :2], depth, flow), "[batch, 3, 24, 48]"),
        ((rgb, depth[..., :5], flow), "[batch, 1, 24, 48]"),
        ((rgb, depth, flow[:, :1]), "[batch, 2, height, width]"),
    ):
        with refused("network.input", token):
            made.encode(*parts)
