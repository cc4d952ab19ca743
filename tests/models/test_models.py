"""The exchange format of networks: save, load, and what goes wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from owl import models
from owl.models.image_autoencoder import ImageAutoencoder
from owl.nn.convolution import folded_weight
from owl.nn.frozen import freeze
from tests.helpers.errors import refused


def network(**changes: object) -> ImageAutoencoder:
    torch.manual_seed(0)
    arguments: dict[str, object] = {"size": (16, 24), "latent_size": (4, 6), "widths": [8, 16], "blocks": [1, 1]}
    built = ImageAutoencoder(**(arguments | changes))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        built.latent_mean.normal_()
    return built


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_network_has_equal_outputs(tmp_path: Path, folded: bool, dtype: torch.dtype) -> None:
    original = network().to(dtype)
    if folded:
        original.fold_weight_norm()
    models.save(original, tmp_path / "export")
    loaded = models.load(tmp_path / "export")
    assert isinstance(loaded, ImageAutoencoder)
    assert not loaded.training
    x = torch.rand(1, 3, 16, 24).to(dtype)
    assert torch.equal(loaded(x, sample=False)[0], original(x, sample=False)[0])
    assert torch.equal(loaded.latent_mean, original.latent_mean)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_frozen_network_is_exported_whole(tmp_path: Path) -> None:
    original = network()
    freeze(original.encoder)
    models.save(original, tmp_path)
    loaded = models.load(tmp_path)
    x = torch.rand(1, 3, 16, 24)
    assert torch.equal(loaded(x, sample=False)[0], original(x, sample=False)[0])


def test_the_files_are_readable_without_this_project_and_nothing_else_is_left(tmp_path: Path) -> None:
    models.save(network(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "model.safetensors"]
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["class_path"] == "owl.models.image_autoencoder.ImageAutoencoder"
    assert config["init_args"]["size"] == [16, 24]
    assert "latent_std" in load_file(tmp_path / "model.safetensors")


def test_saving_a_network_in_channels_last(tmp_path: Path) -> None:
    original = network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    models.save(original, tmp_path)
    x = torch.rand(1, 3, 16, 24)
    assert torch.allclose(models.load(tmp_path)(x, sample=False)[0], original(x, sample=False)[0], atol=1e-5)


def test_a_network_without_its_arguments_cannot_be_saved(tmp_path: Path) -> None:
    with refused("network.config", "Linear", "config"):
        models.save(nn.Linear(2, 2), tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with refused("export.missing", str(tmp_path / "nowhere" / "model.safetensors")):
        models.load(tmp_path / "nowhere")
    models.save(network(), tmp_path)
    (tmp_path / "config.yaml").unlink()
    with refused("export.missing", str(tmp_path / "config.yaml")):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "code", "token"),
    [
        ("a: [", "export.config", "config.yaml"),
        ("just text", "export.config", "config.yaml"),
        ("init_args: {}", "export.config", "'class_path'"),
        ("class_path: owl.nowhere.Network\ninit_args: {}", "export.config", "owl.nowhere"),
        ("class_path: owl.models.image_autoencoder.Missing\ninit_args: {}", "export.config", "Missing"),
        ("class_path: Missing\ninit_args: {}", "export.config", "config.yaml"),
        ("class_path: pathlib.Path\ninit_args: {}", "export.config", "pathlib.Path"),
        ("class_path: owl.models.image_autoencoder.ImageAutoencoder\ninit_args: {depth: 3}", "export.config", "depth"),
        ("class_path: owl.models.image_autoencoder.ImageAutoencoder\ninit_args: {patch: 7}", "network.arguments", "7"),
    ],
)
def test_a_damaged_configuration_is_reported_in_one_sentence(tmp_path: Path, text: str, code: str, token: str) -> None:
    models.save(network(), tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with refused(code, token):
        models.load(tmp_path)


def test_weights_that_are_torn_or_of_another_network_are_refused(tmp_path: Path) -> None:
    models.save(network(), tmp_path)
    config = (tmp_path / "config.yaml").read_text()
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with refused("export.weights", str(tmp_path / "model.safetensors"), "does not fit"):
        models.load(tmp_path)
    models.save(network(latent_channels=8), tmp_path)
    (tmp_path / "config.yaml").write_text(config)
    with refused("export.weights", "size mismatch"):
        models.load(tmp_path)
    models.save(network(blocks=[1, 2]), tmp_path)
    (tmp_path / "config.yaml").write_text(config)
    with refused("export.weights", "missing", "decoder.stages.1.conv.bias"):
        models.load(tmp_path)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, owl.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_fingerprint_follows_the_weights_and_nothing_else() -> None:
    original = network()
    found = models.fingerprint(original.encoder)
    assert len(bytes.fromhex(found)) == 8
    other_layout = network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for same in (network(), other_layout, network().fold_weight_norm(), freeze(network())):
        assert models.fingerprint(same.encoder) == found
    assert models.fingerprint(original.decoder) != found
    with torch.no_grad():
        direction = next(p for name, p in original.encoder.named_parameters() if name.endswith("original1"))
        direction[0] *= 2  # a direction has no length: the same function
        assert models.fingerprint(original.encoder) == found
        direction[0, 0] += 1e-3
    assert models.fingerprint(original.encoder) != found


def test_the_fingerprint_counts_names_shapes_and_buffers() -> None:
    def of(**tensors: torch.Tensor) -> str:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return models.fingerprint(module)

    found = of(a=torch.zeros(2, 3), b=torch.ones(1))
    assert of(b=torch.ones(1), a=torch.zeros(2, 3)) == found
    for other in (of(a=torch.zeros(3, 2), b=torch.ones(1)), of(c=torch.zeros(2, 3), b=torch.ones(1))):
        assert other != found
    assert of(a=torch.zeros(2, 3), b=torch.ones(1) * 2) != found


def test_a_folded_weight_has_the_value_that_torch_computes() -> None:
    layer = network().encoder.stem
    torch.testing.assert_close(folded_weight(layer), layer.weight.detach())
