"""What is exported gives the outputs that were validated, and says where it comes from."""

import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml

from owl import models
from owl.commands.export import main
from owl.latents import encoder_of
from owl.models.image_autoencoder import ImageAutoencoder
from tests.helpers.autoencoders import save_autoencoder, tiny_decoder
from tests.helpers.decoders import LatentDecoder, Pair, PatchEncoder, tiny_pair
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import owl_here, tiny_experiment, write_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run whose averaged weights are far from the raw ones."""
    folder = tmp_path_factory.mktemp("export")
    data = make_dataset(folder / "data", episodes=4, frames=6, size=(32, 48), modalities=("rgb",))
    experiment = tiny_experiment(data, max_steps=3)
    write_config(folder / "tiny.yaml", experiment)
    options = ("--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "0.05")
    assert owl_here("fit", "--config", "tiny.yaml", *options, cwd=folder) == 0
    return folder / "runs" / "tiny" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def expected(checkpoint: Path, image: torch.Tensor) -> torch.Tensor:
    """The averaged network's reconstruction, built by hand."""
    content = torch.load(checkpoint, weights_only=True)
    arguments = content["owl"]["config"]["model"]["init_args"]["network"]["init_args"]
    network = ImageAutoencoder(**arguments).eval()
    weights = {name.removeprefix("network."): value for name, value in content["state_dict"].items()}
    network.load_state_dict(weights)
    with torch.no_grad():
        averaged = network(image, sample=False)[0]
        network.load_state_dict({n.removeprefix("network."): v for n, v in content["ema"]["raw"].items()}, strict=False)
        assert (network(image, sample=False)[0] - averaged).abs().max() > 0.01
    return averaged


def test_a_loaded_export_gives_the_outputs_of_the_averaged_weights(
    checkpoint: Path, image: torch.Tensor, expected: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert owl_here("export", checkpoint, tmp_path / "network", cwd=tmp_path) == 0
    assert "owl.models.load" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "network").iterdir()} == {
        "config.yaml",
        "model.safetensors",
        "provenance.yaml",
    }
    network = models.load(tmp_path / "network")
    assert not network.training
    with torch.no_grad():
        assert torch.equal(network(image, sample=False)[0], expected)
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert torch.equal(network.latent_std, stored["network.latent_std"])
    assert (network.latent_std != 1).all()


def test_a_checkpoint_loads_like_its_export_and_has_its_fingerprint(
    checkpoint: Path, image: torch.Tensor, expected: torch.Tensor, tmp_path: Path
) -> None:
    main(str(checkpoint), str(tmp_path / "plain"))
    main(str(checkpoint), str(tmp_path / "folded"), fold=True)
    network = models.load(checkpoint)
    assert not network.training
    with torch.no_grad():
        assert torch.equal(network(image, sample=False)[0], expected)
    for folder in ("plain", "folded"):
        exported = models.load(tmp_path / folder)
        assert models.fingerprint(exported.encoder) == models.fingerprint(network.encoder)


def test_folding_keeps_the_outputs(
    checkpoint: Path, image: torch.Tensor, expected: torch.Tensor, tmp_path: Path
) -> None:
    assert owl_here("export", checkpoint, tmp_path / "folded", "--fold", cwd=tmp_path) == 0
    network = models.load(tmp_path / "folded")
    assert network.config["norm"] == "none"
    assert not any("parametrizations" in name for name in network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(network(image, sample=False)[0], expected, atol=1e-5, rtol=1e-5)


def test_provenance_names_what_made_it(checkpoint: Path, tmp_path: Path) -> None:
    main(str(checkpoint), str(tmp_path))
    found = yaml.safe_load((tmp_path / "provenance.yaml").read_text())
    content = torch.load(checkpoint, weights_only=True)
    assert found == {
        "checkpoint": str(checkpoint),
        "global_step": 3,
        "recipe": "owl.recipes.image_vae.ImageVAE",
        "code_version": content["owl"]["code_version"],
        "dataset": content["owl"]["dataset"],
        "stride": 1,
        "length": 1,
    }
    main(str(checkpoint), str(tmp_path), fold=True)  # an earlier export is replaced
    assert models.load(tmp_path).config["norm"] == "none"
    assert not list(tmp_path.glob("*.partial"))


def test_a_wrong_checkpoint_is_reported_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    (tmp_path / "garbage.ckpt").write_bytes(b"garbage")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    for name, change in (("theirs", {"class_path": "theirs.Network"}), ("renamed", {"init_args": {"former_name": 1}})):
        changed = deepcopy(content)
        changed["owl"]["networks"]["network"] |= change
        torch.save(changed, tmp_path / f"{name}.ckpt")
    del content["state_dict"]["network.latent_mean"]
    torch.save(content, tmp_path / "less.ckpt")
    for name, code, *tokens in (
        ("none", "checkpoint.missing"),
        ("garbage", "checkpoint.unreadable"),
        ("foreign", "checkpoint.foreign"),
        ("theirs", "network.rebuild", "theirs.Network"),
        ("renamed", "network.rebuild", "former_name"),
        ("less", "network.rebuild", "latent_mean"),
    ):
        with refused(code, str(tmp_path / f"{name}.ckpt"), *tokens):
            main(str(tmp_path / f"{name}.ckpt"), str(out))
        assert not out.exists()


@pytest.fixture(scope="module")
def pair(checkpoint: Path) -> Path:
    """A checkpoint of a recipe with two networks to export and one that is not."""
    folder = checkpoint.parents[3]
    write_config(folder / "pair.yaml", tiny_pair(folder / "data", max_steps=3))
    assert owl_here("fit", "--config", "pair.yaml", cwd=folder) == 0
    return folder / "runs/pair/checkpoints/last.ckpt"


def test_a_recipe_exports_the_networks_that_it_names_averaged(pair: Path, tmp_path: Path) -> None:
    content = torch.load(pair, weights_only=True)
    averaged = {f"{name}.{weight}" for name in ("encoder.down", "decoder.up") for weight in ("weight", "bias")}
    assert content["ema"]["raw"].keys() == averaged
    assert owl_here("export", pair, tmp_path, cwd=tmp_path) == 0
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["decoder", "encoder"]
    for name, kind in (("encoder", PatchEncoder), ("decoder", LatentDecoder)):
        exported, loaded = models.load(tmp_path / name), models.load(pair, name)
        assert type(exported) is type(loaded) is kind
        for tensor, value in exported.state_dict().items():
            assert torch.equal(value, content["state_dict"][f"{name}.{tensor}"])
            assert torch.equal(value, loaded.state_dict()[tensor])
    assert not torch.equal(content["ema"]["raw"]["encoder.down.weight"], content["state_dict"]["encoder.down.weight"])


def test_one_of_several_networks_is_selected_by_name(pair: Path, checkpoint: Path) -> None:
    for name in (None, "critic"):
        with refused("network.name", str(pair), "encoder, decoder", name or "none"):
            models.load(pair, name)
    with refused("network.name", "network", "decoder"):
        models.load(checkpoint, "decoder")


def test_a_network_that_is_named_must_be_there() -> None:
    recipe = Pair()
    recipe.exports = ("encoder", "denoiser")  # type: ignore[assignment]
    with refused("recipe.exports", "Pair", "denoiser"):
        models.exported(recipe)


def test_a_decoder_decodes_the_same_from_its_checkpoint_and_its_export_without_its_autoencoder(
    checkpoint: Path, tmp_path: Path
) -> None:
    autoencoder = save_autoencoder(tmp_path / "autoencoder")
    trainer = {"max_steps": 2, "limit_val_batches": 0}
    data = checkpoint.parents[3] / "data"
    configuration = tiny_decoder(data, autoencoder, "owl.recipes.distill.Distill", trainer=trainer)
    configuration["model"]["init_args"]["network"] = {
        "class_path": "owl.models.image_decoder.ImageDecoder",
        "init_args": {"widths": [16], "blocks": [1], "patch": 8},
    }
    write_config(tmp_path / "small.yaml", configuration)
    assert owl_here("fit", "--config", "small.yaml", cwd=tmp_path) == 0
    mark = encoder_of(models.load(autoencoder))
    shutil.rmtree(autoencoder)
    trained = tmp_path / "runs/small/checkpoints/last.ckpt"
    assert owl_here("export", trained, tmp_path / "decoder", cwd=tmp_path) == 0
    assert owl_here("export", trained, tmp_path / "folded", "--fold", cwd=tmp_path) == 0
    loaded, exported, folded = (models.load(path) for path in (trained, tmp_path / "decoder", tmp_path / "folded"))
    assert encoder_of(loaded) == encoder_of(exported) == mark
    latent = torch.randn(2, 4, 4, 6)
    with torch.no_grad():
        decoded, again, faster = (network.decode(latent) for network in (loaded, exported, folded))
    assert decoded.std() > 0
    assert torch.equal(again, decoded)
    torch.testing.assert_close(faster, decoded, atol=1e-5, rtol=1e-5)
