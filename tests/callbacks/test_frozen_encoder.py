"""Training on pictures with the encoder beside the recipe is training on latents that were encoded beforehand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer

from owl import hardware, models
from owl.callbacks.frozen_encoder import FrozenEncoder
from owl.commands.data_encode import main as encode
from owl.data.datamodule import ShardDataModule
from owl.data.windows import WindowDataset
from owl.latents import encoder_of
from owl.models.world_model import WorldTransformer
from owl.recipes.world_model import WorldModel
from tests.helpers.arithmetic import FAST, SLOW
from tests.helpers.autoencoders import save_audio_autoencoder
from tests.helpers.errors import refused
from tests.helpers.latents import streams
from tests.helpers.shards import AXES, BUTTONS, make_dataset
from tests.helpers.tiny import REPOSITORY, owl_here, quiet_trainer, write_config
from tests.helpers.world import AUTOENCODER, FOOTAGE, LATENTS, make_world, tiny_world_model
from tests.test_docs import blocks

CALLBACK = "owl.callbacks.frozen_encoder.FrozenEncoder"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Footage, its autoencoder, the latents of it, and the same training on each of the two datasets."""
    folder = make_world(tmp_path_factory.mktemp("frozen_encoder"))
    (page,) = (block for block in blocks(REPOSITORY / "docs/how-to/encode.md") if block.language == "yaml")
    for name, dataset, modality in (("latents", LATENTS, "latent"), ("pictures", FOOTAGE, "rgb")):
        experiment = tiny_world_model(dataset)
        experiment["model"]["init_args"]["final_lr"] = 1.0  # a run may be made longer without another schedule
        experiment["data"]["init_args"] |= {"modalities": [modality, "controls"], "validation_windows": 3}
        experiment["trainer"] |= yaml.safe_load(page.content)["trainer"]
        write_config(folder / f"{name}.yaml", experiment)
    return folder


def fit(lab: Path, config: str, name: str, steps: int, *options: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Train; the metrics and the checkpoint."""
    arguments = ("--config", f"{config}.yaml", "--name", name, "--trainer.max_steps", str(steps), *options)
    assert owl_here("fit", *arguments, cwd=lab) == 0
    run = lab / "runs" / name
    return json.loads((run / "metrics.json").read_text()), torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def test_pictures_train_what_latents_do_and_a_resumed_run_resumes_exactly(lab: Path) -> None:
    expected, stored = fit(lab, "latents", "latents", 4)
    found, whole = fit(lab, "pictures", "whole", 4)
    assert found.keys() == expected.keys()
    losses = [name for name in expected if name.startswith(("train/", "val/"))]
    assert len(losses) == 9
    assert {n: found[n] for n in losses} == pytest.approx({n: expected[n] for n in losses}, rel=2e-3)  # float16
    assert whole["state_dict"].keys() == stored["state_dict"].keys()
    for name, tensor in stored["state_dict"].items():
        torch.testing.assert_close(whole["state_dict"][name], tensor, atol=2e-3, rtol=2e-3)
    for name in ("video_encoder", "video_mean", "video_std"):
        assert whole["state_dict"][f"network.{name}"].any()
    arguments = ("--config", "pictures.yaml", "--name", "whole", "--ckpt_path", "last")
    assert owl_here("validate", *arguments, cwd=lab) == 0
    validated = json.loads((lab / "runs/whole/validate.json").read_text())
    assert validated == pytest.approx({name: found[name] for name in validated}, rel=1e-5)
    assert "val/loss" in validated
    fit(lab, "pictures", "parts", 2)
    _, parts = fit(lab, "pictures", "parts", 4, "--ckpt_path", "last")
    for state in (lambda content: content["state_dict"], lambda content: content["ema"]["raw"]):
        assert all(torch.equal(state(parts)[name], tensor) for name, tensor in state(whole).items())


def test_latents_train_alike_with_and_without_the_callback(lab: Path) -> None:
    _, with_callback = fit(lab, "latents", "with", 2)
    _, without = fit(lab, "latents", "without", 2, "--trainer.callbacks", "null")
    for name, tensor in without["state_dict"].items():
        assert torch.equal(with_callback["state_dict"][name], tensor)


def recipe() -> WorldModel:
    return WorldModel(
        WorldTransformer(**streams(video=(4, 4, 6)), buttons=BUTTONS, axes=AXES, width=32, depth=1, heads=2, window=4)
    )


def trained_in_python(lab: Path, callback: FrozenEncoder) -> Trainer:
    trainer = quiet_trainer(lab, callbacks=[callback], max_steps=2, limit_val_batches=1)
    data = ShardDataModule(str(lab / FOOTAGE), ["rgb", "controls"], length=4, batch_size=4, num_workers=0)
    trainer.fit(recipe(), data)
    return trainer


def test_the_encoder_is_no_part_of_the_recipe_and_does_not_change(lab: Path) -> None:
    callback = FrozenEncoder(str(lab / AUTOENCODER))
    before = models.fingerprint(models.load(lab / AUTOENCODER))
    trainer = trained_in_python(lab, callback)
    network = callback.encoder.network
    assert models.fingerprint(network) == before
    assert not network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    inside = {id(parameter) for parameter in network.parameters()}
    assert not inside & {id(parameter) for parameter in trainer.lightning_module.parameters()}
    assert not inside & {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert encoder_of(trainer.lightning_module.network, "video") == callback.encoder.fingerprint


def test_latents_are_those_of_data_encode_in_the_precision_that_is_chosen(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cpu_rates", lambda: FAST)
    exact = FrozenEncoder(str(lab / AUTOENCODER), batch_size=3)
    trainer = trained_in_python(lab, exact)
    rgb = WindowDataset(lab / FOOTAGE, "validation", ["rgb"], length=4).batch([0, 5])["rgb"]
    expected = WindowDataset(lab / LATENTS, "validation", ["latent"], length=4).batch([0, 5])["latent"]
    torch.testing.assert_close(exact.encode(rgb), expected, atol=1e-3, rtol=1e-3)
    half = FrozenEncoder(str(lab / AUTOENCODER), precision="bf16")
    half.setup(trainer, trainer.lightning_module, "fit")
    assert half.encode(rgb).dtype == torch.float32
    rounding = (half.encode(rgb) - exact.encode(rgb)).abs().max()
    assert 0 < rounding < 0.1 * expected.abs().max()
    automatic = FrozenEncoder(str(lab / AUTOENCODER), precision="auto")
    automatic.setup(trainer, trainer.lightning_module, "fit")
    assert torch.equal(automatic.encode(rgb), half.encode(rgb))
    monkeypatch.setattr(hardware, "cpu_rates", lambda: SLOW)
    assert torch.equal(automatic.encode(rgb), half.encode(rgb))  # what was chosen once is kept
    continued = FrozenEncoder(str(lab / AUTOENCODER), precision="auto")
    continued.setup(trainer, trainer.lightning_module, "fit")
    assert torch.equal(continued.encode(rgb), exact.encode(rgb))
    continued.load_state_dict(automatic.state_dict())
    assert torch.equal(continued.encode(rgb), half.encode(rgb))


def test_what_does_not_fit_is_reported(lab: Path) -> None:
    def refuse(config: str, code: str, *words: str, options: tuple[str, ...] = ()) -> None:
        with refused(code, *words):
            fit(lab, config, "refused", 1, *options)
        assert not (lab / "refused").exists()

    other = models.load(lab / AUTOENCODER)
    with torch.no_grad():
        other.encoder.mean.conv.bias.add_(1)
    models.save(other, lab / "other")
    path = ("--trainer.callbacks", CALLBACK, "--trainer.callbacks.path")
    refuse("latents", "latents.encoder", LATENTS, "other", models.fingerprint(other.encoder), options=(*path, "other"))
    fit(lab, "pictures", "started", 1)
    again = ("--name", "started", "--trainer.max_steps", "2", "--ckpt_path", "last")
    refuse("pictures", "latents.encoder", models.fingerprint(other.encoder), options=(*path, "other", *again))
    small = ("--data.size", "[16, 24]")
    refuse("pictures", "dataset.size", FOOTAGE, "16x24", "32x48", options=small)
    refuse("pictures", "recipe.dataset", FOOTAGE, "controls", options=("--data.modalities", "[controls]"))
    refuse("pictures", "dataset.modalities", "no latent", "FrozenEncoder", options=("--trainer.callbacks", "null"))


class Heard(LightningModule):
    """Learns nothing; keeps the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[dict[str, torch.Tensor]] = []
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.batches.append(batch)
        return self.weight * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def hear(folder: Path, data: str, path: str, modalities: list[str], **windows: Any) -> tuple[Heard, dict[str, Any]]:
    """What a recipe gets of sound, and the description of its latents."""
    recipe, callback = Heard(), FrozenEncoder(str(folder / path), batch_size=2)
    module = ShardDataModule(str(folder / data), modalities, batch_size=2, num_workers=0, **windows)
    quiet_trainer(folder, callbacks=[callback], max_epochs=1, limit_val_batches=0).fit(recipe, module)
    return recipe, module.train_dataset.info.modalities["audio_latent"]


@pytest.mark.parametrize(("strides", "tokens"), [([3, 5, 7], 5 * 12), ([4, 5, 5], 63)])
def test_sound_is_encoded_as_data_encode_does(tmp_path: Path, strides: list[int], tokens: int) -> None:
    """In episodes of one window, of which both know the same; with whole frames of tokens, and without."""
    make_dataset(tmp_path / "sound", episodes=5, frames=5, modalities=("audio",))
    save_audio_autoencoder(tmp_path / "encoder", strides=strides)
    encode([str(tmp_path / "encoder")], str(tmp_path / "sound"), str(tmp_path / "latents"), keep="audio")
    found, described = hear(tmp_path, "sound", "encoder", ["audio"], length=5)
    stored, expected = hear(tmp_path, "latents", "encoder", ["audio", "audio_latent"], length=5)
    assert len(found.batches) == len(stored.batches) == 1
    for here, there in zip(found.batches, stored.batches, strict=True):
        assert torch.equal(here["audio"], there["audio"])
        assert here["audio_latent"].flatten(1, -2).shape == (len(here["audio"]), tokens, 4)
        torch.testing.assert_close(here["audio_latent"], there["audio_latent"], atol=1e-3, rtol=1e-3)
    for name in ("shape", "rate", "posterior", "encoder"):
        assert described.get(name) == expected.get(name)
    for name in ("mean", "std"):
        torch.testing.assert_close(described[name], expected[name], atol=1e-3, rtol=1e-3)


def test_sound_that_does_not_fit_is_reported(tmp_path: Path) -> None:
    make_dataset(tmp_path / "sound", episodes=3, frames=5, modalities=("rgb", "audio"))
    save_audio_autoencoder(tmp_path / "mono", channels=1)
    save_audio_autoencoder(tmp_path / "telephone", sample_rate=8_000)
    with refused("network.input", str(tmp_path / "sound"), "2 channels", "mono", "takes 1"):
        hear(tmp_path, "sound", "mono", ["audio"], length=2)
    with refused("network.input", str(tmp_path / "sound"), "44100 samples", "telephone", "takes 8000"):
        hear(tmp_path, "sound", "telephone", ["audio"], length=2)
    with refused("recipe.dataset", str(tmp_path / "sound"), "hold rgb", "audio_latent", "audio"):
        hear(tmp_path, "sound", "telephone", ["rgb"], length=2)
    with refused("recipe.dataset", str(tmp_path / "sound"), "stride of 2", "data encode"):
        hear(tmp_path, "sound", "telephone", ["audio"], length=2, stride=2)
