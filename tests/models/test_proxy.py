"""Frozen autoencoders as targets: diffusers' folders and OWL's own, their latents, and every way to be wrong."""

import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from owl import models
from owl.models.diffusion_autoencoder import DiffusionAutoencoder
from owl.models.diffusion_decoder import DiTDecoder
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.inverse_dynamics import InverseDynamicsModel
from owl.models.proxy import ProxyAutoencoder
from owl.nn.frozen import trained
from tests.helpers.errors import refused
from tests.helpers.proxies import TINY, save_proxy

SIZE = (16, 24)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at every attempt to reach another computer."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("a proxy autoencoder used the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def image(*shape: int) -> Tensor:
    return torch.rand(*shape or (2, 3, *SIZE), generator=torch.Generator().manual_seed(1)) * 2 - 1


class Holder(nn.Module):
    """A decoder with a proxy, as `models.save` and `models.load` see it."""

    def __init__(self, proxy: str | dict[str, Any], size: tuple[int, int]) -> None:
        super().__init__()
        self.proxy = ProxyAutoencoder(proxy, size)
        self.own = nn.Linear(2, 2)
        self.config = {"proxy": self.proxy.config, "size": list(size)}


@pytest.mark.parametrize("name", TINY)
def test_latents_are_those_of_diffusers_scaled_and_shifted(tmp_path: Path, name: str) -> None:
    original = save_proxy(tmp_path, name)
    proxy = ProxyAutoencoder(str(tmp_path), SIZE)
    assert (proxy.latent_channels, proxy.latent_size) == (4, (8, 12))
    with torch.no_grad():
        encoded = original.encode(image())
        latent = {
            "AutoencoderTiny": lambda: encoded.latents,
            "AutoencoderKL": lambda: encoded.latent_dist.mode(),
            "AutoencoderDC": lambda: encoded.latent,
        }[name]()
        scale, shift = original.config["scaling_factor"], original.config.get("shift_factor") or 0.0
        assert torch.allclose(proxy.encode(image()), (latent - shift) * scale, atol=1e-6)
        assert torch.allclose(proxy.decode(proxy.encode(image())), original.decode(latent).sample, atol=1e-5)
    assert proxy.config["fingerprint"] == models.fingerprint(original)


def test_statistics_of_every_channel_replace_the_shift(tmp_path: Path) -> None:
    statistics = {"latents_mean": [0.0, 1.0, 2.0, 3.0], "latents_std": [1.0, 2.0, 4.0, 8.0]}
    save_proxy(tmp_path, "AutoencoderKL", scaling_factor=0.5, **statistics)
    proxy = ProxyAutoencoder(str(tmp_path), SIZE)
    assert proxy.mean.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert proxy.std.tolist() == [2.0, 4.0, 8.0, 16.0]


def test_the_latent_of_flux_for_360p(tmp_path: Path) -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    save_proxy(tmp_path, "AutoencoderKL", block_out_channels=(4,) * 4, latent_channels=16, **blocks)
    proxy = ProxyAutoencoder(str(tmp_path), (360, 640))
    assert (proxy.latent_channels, *proxy.latent_size) == (16, 45, 80)


def autoencoder(**changes: Any) -> ImageAutoencoder:
    torch.manual_seed(0)
    network = ImageAutoencoder(**{"size": SIZE, "latent_size": (4, 6), "widths": [8, 16], "blocks": [1, 1]} | changes)
    network.latent_mean.normal_()
    network.latent_std.fill_(0.5)
    return network.eval()


def test_an_autoencoder_of_owl_is_standardised_by_its_own_statistics(tmp_path: Path) -> None:
    original = autoencoder()
    models.save(original, tmp_path)
    proxy = ProxyAutoencoder(str(tmp_path), SIZE)
    assert (proxy.latent_channels, proxy.latent_size) == (4, (4, 6))
    with torch.no_grad():
        latent = original.encode(image()).mean
        assert torch.allclose(proxy.encode(image()), (latent - original.latent_mean[:, None, None]) / 0.5, atol=1e-6)
        assert torch.allclose(proxy.decode(proxy.encode(image())), original.decode(latent), atol=1e-5)


def test_nothing_is_trained_or_saved_and_gradients_reach_the_latent(tmp_path: Path) -> None:
    save_proxy(tmp_path)
    proxy = ProxyAutoencoder(str(tmp_path), SIZE).train()
    assert not trained(proxy)
    assert not proxy.state_dict()
    assert not any(part.training for part in proxy.modules())
    assert not proxy.encode(image().requires_grad_()).requires_grad
    latent = torch.randn(1, 4, 8, 12, requires_grad=True)
    proxy.decode(latent).square().sum().backward()
    assert latent.grad is not None
    assert latent.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["diffusers", "owl"])
def test_an_export_contains_the_proxy_and_a_checkpoint_reads_it_again(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "proxy"
    if kind == "owl":
        models.save(autoencoder(), folder)
    else:
        save_proxy(folder)
    original = Holder(str(folder), SIZE)
    models.save(original, tmp_path / "export")
    checkpoint = original.state_dict()
    assert set(checkpoint) == {"own.weight", "own.bias"}
    again = Holder(**original.config)
    again.load_state_dict(checkpoint)
    latent = torch.randn(1, *original.proxy.encode(image()).shape[1:])
    expected = original.proxy.decode(latent)
    assert torch.equal(again.proxy.decode(latent), expected)
    again.load_state_dict(checkpoint)  # a second time, such as for averaged weights, changes nothing

    shutil.rmtree(folder)
    loaded = models.load(tmp_path / "export")
    assert torch.equal(loaded.proxy.decode(latent), expected)  # type: ignore[operator, union-attr]
    with refused("proxy.missing", str(folder)):
        Holder(**original.config).load_state_dict(checkpoint)


def test_a_proxy_without_weights_is_not_used(tmp_path: Path) -> None:
    save_proxy(tmp_path)
    proxy = Holder(**Holder(str(tmp_path), SIZE).config).proxy
    for use in (lambda: proxy.encode(image()), lambda: proxy.decode(torch.zeros(1, 4, 8, 12))):
        with pytest.raises(RuntimeError, match="no weights"):
            use()


def test_a_diffusion_autoencoder_has_the_proxy_of_its_decoder(tmp_path: Path) -> None:
    original = save_proxy(tmp_path)
    decoder = DiTDecoder(3, SIZE, (4, 6), 4, patch=(4, 2), width=32, depth=1, heads=2, proxy=str(tmp_path))
    network = DiffusionAutoencoder.of(decoder, autoencoder())
    assert torch.equal(network.to_target(image(), None), original.encode(image()).latents)


def test_another_proxy_at_the_same_path_is_refused(tmp_path: Path) -> None:
    save_proxy(tmp_path)
    original = Holder(str(tmp_path), SIZE)
    save_proxy(tmp_path, num_encoder_blocks=(1, 2))
    with refused("proxy.changed", str(tmp_path), original.config["proxy"]["fingerprint"]):
        Holder(**original.config).load_state_dict(original.state_dict())


def test_a_missing_folder_or_file_is_named(tmp_path: Path) -> None:
    with refused("proxy.missing", str(tmp_path / "nowhere" / "config.json")):
        ProxyAutoencoder(str(tmp_path / "nowhere"), SIZE)
    save_proxy(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with refused("proxy.missing", str(tmp_path / "diffusion_pytorch_model.safetensors")):
        ProxyAutoencoder(str(tmp_path), SIZE)
    with refused("checkpoint.missing", str(tmp_path / "last.ckpt")):
        ProxyAutoencoder(str(tmp_path / "last.ckpt"), SIZE)


@pytest.mark.parametrize("content", [{"_class_name": "AutoencoderOobleck"}, {"model_type": "bert"}, ["AutoencoderKL"]])
def test_another_class_is_named(tmp_path: Path, content: Any) -> None:
    save_proxy(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with refused("proxy.class", str(tmp_path)):
        ProxyAutoencoder(str(tmp_path), SIZE)


def test_a_folder_of_other_channels_is_refused(tmp_path: Path) -> None:
    save_proxy(tmp_path, in_channels=4)
    with refused("proxy.class", str(tmp_path), "in_channels 4"):
        ProxyAutoencoder(str(tmp_path), SIZE)


def test_a_network_of_owl_that_is_no_autoencoder_is_refused(tmp_path: Path) -> None:
    models.save(InverseDynamicsModel(size=(32, 48)), tmp_path)
    with refused("proxy.class", str(tmp_path), "InverseDynamicsModel"):
        ProxyAutoencoder(str(tmp_path), SIZE)


def test_images_that_the_proxy_does_not_divide_are_refused(tmp_path: Path) -> None:
    save_proxy(tmp_path)
    with refused("proxy.size", "17x24", "2"):
        ProxyAutoencoder(str(tmp_path), (17, 24))


def test_an_autoencoder_of_owl_for_another_size_is_refused(tmp_path: Path) -> None:
    models.save(autoencoder(), tmp_path)
    with refused("proxy.size", "16x24", "32x48"):
        ProxyAutoencoder(str(tmp_path), (32, 48))


def test_images_and_latents_of_another_size_are_refused(tmp_path: Path) -> None:
    save_proxy(tmp_path)
    proxy = ProxyAutoencoder(str(tmp_path), SIZE)
    with refused("network.input", "[2, 3, 24, 16]", "16, 24"):
        proxy.encode(image(2, 3, 24, 16))
    with refused("network.input", "[1, 4, 12, 8]", "4, 8, 12"):
        proxy.decode(torch.zeros(1, 4, 12, 8))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    save_proxy(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with refused("proxy.weights", str(weights)):
        ProxyAutoencoder(str(tmp_path), SIZE)
    save_proxy(tmp_path / "other", num_decoder_blocks=(1, 2))
    weights.write_bytes((tmp_path / "other" / weights.name).read_bytes())
    with refused("proxy.weights", "AutoencoderTiny"):  # tensors that the configuration does not know
        ProxyAutoencoder(str(tmp_path), SIZE)
    (tmp_path / "config.json").write_text((tmp_path / "other" / "config.json").read_text())
    weights.write_bytes(whole)
    with refused("proxy.weights", "AutoencoderTiny"):  # tensors that are missing: they would be random
        ProxyAutoencoder(str(tmp_path), SIZE)


def test_missing_diffusers_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_proxy(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with refused("proxy.package", "owl-platform[diffusers]"):
        ProxyAutoencoder(str(tmp_path), SIZE)
