"""A small encoder learns the teacher's posterior, and its latents pass for those of the teacher."""

from pathlib import Path

import pytest
import torch

from owl import models
from owl.data.shards import DatasetInfo
from owl.latents import encoder_of, load_encoder
from owl.losses.lpips import LPIPS
from owl.models.image_encoder import ImageEncoder
from owl.recipes.distill_encoder import DistillEncoder
from tests.helpers.autoencoders import save_autoencoder
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import owl_here, tiny_experiment, write_config

STUDENT = {"class_path": "owl.models.image_encoder.ImageEncoder"}
STUDENT |= {"init_args": {"widths": [8, 8], "blocks": [1, 1], "patch": 4}}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill_encoder")
    make_dataset(folder / "data", 3, 12, (32, 48), ["rgb"])
    save_autoencoder(folder / "teacher")
    experiment = tiny_experiment(folder / "data")
    arguments = {"autoencoder": "teacher", "network": STUDENT, "warmup_steps": 1, "final_lr": 1.0}
    experiment["model"] = {"class_path": "owl.recipes.distill_encoder.DistillEncoder", "init_args": arguments}
    experiment["data"]["init_args"]["validation_windows"] = 3
    write_config(folder / "tiny.yaml", experiment)
    for name, steps, *options in (("whole", "4"), ("resumed", "3"), ("resumed", "4", "--ckpt_path", "last")):
        limit = ("--name", name, "--trainer.max_steps", steps)
        assert owl_here("fit", "--config", "tiny.yaml", *limit, *options, cwd=folder) == 0
    return folder


def student(*geometry: object) -> ImageEncoder:
    return ImageEncoder(*geometry, widths=[8, 8], blocks=[1, 1], patch=4)  # type: ignore[arg-type]


def test_both_moments_are_matched_in_the_latents_own_units(lab: Path) -> None:
    made = DistillEncoder(str(lab / "teacher"), student, lpips=LPIPS())
    made.teacher.latent_std.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    posterior, target, terms = made.terms(image)
    scaled = [(posterior.mean - target.mean)[:, channel] / (channel + 1) for channel in range(4)]
    torch.testing.assert_close(terms["mean"], torch.stack(scaled).square().mean())
    torch.testing.assert_close(terms["logvar"], (posterior.logvar - target.logvar).square().mean())
    for name, silent in (("mean", "logvar"), ("logvar", "mean")):
        made.zero_grad()
        made.terms(image)[2][name].backward()
        grad = {n: p.grad is not None for n, p in made.network.encoder.named_parameters() if n.split(".")[0] == silent}
        assert not any(grad.values())
        assert all(parameter.grad is None for parameter in made.teacher.parameters())
        assert sum(parameter.grad is not None for parameter in made.network.parameters()) > 5


def test_its_latents_pass_for_those_of_the_teacher(lab: Path) -> None:
    checkpoint = lab / "runs" / "whole" / "checkpoints" / "last.ckpt"
    trained, teacher = models.load(checkpoint), load_encoder(str(lab / "teacher"))
    assert isinstance(trained, ImageEncoder)
    assert encoder_of(trained) == teacher.fingerprint
    assert owl_here("data", "encode", checkpoint, "data", "latents", cwd=lab) == 0
    entry = DatasetInfo.load(lab / "latents").modalities["latent"]["encoder"]
    own = models.fingerprint(trained.encoder)
    assert entry["fingerprint"] == teacher.fingerprint != own
    assert entry["distilled"] == own
    assert entry["class_path"] == "owl.models.image_encoder.ImageEncoder"
    assert "distilled" not in teacher.identity
    with torch.no_grad():
        next(trained.parameters()).add_(1)
    models.save(trained, lab / "another")  # two students of one teacher are not mixed in one dataset
    with refused("dataset.other-settings", own):
        owl_here("data", "encode", "another", "data", "latents", cwd=lab)
    trained = models.load(checkpoint)
    folded = trained.fold_weight_norm()
    assert models.fingerprint(folded.encoder) == own


def test_a_resumed_run_equals_the_uninterrupted_one(lab: Path) -> None:
    runs = (lab / "runs" / name / "checkpoints" / "last.ckpt" for name in ("whole", "resumed"))
    whole, resumed = (torch.load(run, weights_only=True) for run in runs)
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(resumed[key], whole[key], rtol=0, atol=0)
    assert not any("teacher" in name for name in whole["state_dict"])
