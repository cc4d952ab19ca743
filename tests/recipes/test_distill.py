"""A small decoder learns from the teacher alone, from the truth, or both, and replaces the teacher for its latents."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from owl import models
from owl.latents import encoder_of
from owl.losses.lpips import LPIPS
from owl.models.discriminators import PatchDiscriminator
from owl.models.image_decoder import ImageDecoder
from owl.recipes.distill import Distill, Weights
from tests.helpers.autoencoders import save_autoencoder, tiny_decoder
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import owl_here, write_config

RECIPE = "owl.recipes.distill.Distill"
STUDENT = {"class_path": "owl.models.image_decoder.ImageDecoder"}
STUDENT |= {"init_args": {"widths": [8, 8], "blocks": [1, 1], "patch": 4}}
DISCRIMINATOR = {"class_path": "owl.models.discriminators.PatchDiscriminator", "init_args": {"width": 8, "layers": 2}}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    make_dataset(folder / "data", 3, 12, (32, 48), ["rgb"])
    save_autoencoder(folder / "encoder")
    save_autoencoder(folder / "other", seed=1)
    weights = {"lpips": 0.0, "adversarial": 0.5}
    options = {"discriminator": DISCRIMINATOR, "adversarial_ramp": 2, "penalty_every": 2}
    for name, more in (("plain", {"weights": {"lpips": 0.0}}), ("gan", options | {"weights": weights})):
        experiment = tiny_decoder("data", "encoder", RECIPE, network=STUDENT, warmup_steps=1, final_lr=1.0, **more)
        experiment["data"]["init_args"]["validation_windows"] = 3
        write_config(folder / f"{name}.yaml", experiment)
    return folder


def student(*geometry: Any) -> ImageDecoder:
    return ImageDecoder(*geometry, widths=[8, 8], blocks=[1, 1], patch=4)


def recipe(lab: Path, **options: Any) -> Distill:
    weights = Weights(l1=0.0, l2=1.0, lpips=0.0)
    torch.manual_seed(0)
    return Distill(str(lab / "encoder"), student, lpips=LPIPS(), weights=weights, **options)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(2, 4, 4, 6, generator=generator)
    return latent, torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1


@pytest.mark.parametrize("truth", [0.0, 0.25, 1.0])
def test_the_target_is_the_teachers_output_the_true_frame_or_both(lab: Path, truth: float) -> None:
    made = recipe(lab, truth=truth)
    latent, image = batch()
    taught, decoded = made.taught(latent), made.network.decode(latent)
    errors = [(decoded - target).square().mean() for target in (taught, image)]
    expected = (1 - truth) * errors[0] + truth * errors[1]
    (found,) = made.compare(decoded, latent, image).values()
    torch.testing.assert_close(found, expected)


def test_without_truth_the_teacher_itself_is_the_optimum_and_it_runs_only_where_needed(lab: Path) -> None:
    made = recipe(lab, truth=0.0)
    latent, image = batch()
    assert made.compare(made.taught(latent), latent, image)["l2"] == 0
    made = recipe(lab, truth=1.0)
    made.teacher = torch.nn.Identity()
    assert made.compare(image, latent, image)["l2"] == 0


def test_the_loss_reaches_the_student_and_nothing_else(lab: Path) -> None:
    made = recipe(lab, discriminator=PatchDiscriminator(width=8, layers=2))
    latent, image = batch()
    latent.requires_grad_()
    decoded = made.network.decode(latent.detach())
    made.compare(decoded, latent, image)["l2"].backward()
    assert latent.grad is None
    assert all(parameter.grad is None for parameter in made.teacher.parameters())
    assert all(parameter.grad is not None for parameter in made.network.parameters())


def test_the_student_replaces_the_teacher_for_its_latents(lab: Path) -> None:
    assert owl_here("fit", "--config", "plain.yaml", "--name", "plain", cwd=lab) == 0
    before = models.fingerprint(models.load(lab / "encoder"))
    checkpoint = lab / "runs" / "plain" / "checkpoints" / "last.ckpt"
    trained = models.load(checkpoint)
    autoencoder = models.load(lab / "encoder")
    assert isinstance(trained, ImageDecoder)
    assert encoder_of(trained) == encoder_of(autoencoder) == encoder_of(ImageDecoder.of(autoencoder))
    assert trained.decode(batch()[0]).shape == autoencoder.decode(batch()[0]).shape
    assert models.fingerprint(autoencoder) == before
    assert not any("teacher" in name for name in torch.load(checkpoint, weights_only=True)["state_dict"])


def test_a_resumed_run_equals_the_uninterrupted_one(lab: Path) -> None:
    """With a discriminator, which matters, and stopped between two penalties."""

    def fit(run: str, steps: int, *options: str) -> dict[str, Any]:
        limit = ("--trainer.max_steps", str(steps))
        assert owl_here("fit", "--config", "gan.yaml", "--name", run, *limit, *options, cwd=lab) == 0
        return torch.load(lab / "runs" / run / "checkpoints" / "last.ckpt", weights_only=True)

    whole = fit("whole", 4)
    fit("resumed", 3)
    resumed = fit("resumed", 4, "--ckpt_path", "last")
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(resumed[key], whole[key], rtol=0, atol=0)
    assert len(whole["optimizer_states"]) == 2
    fit("without", 4, "--model.weights.adversarial=0")
    with_it, without = (models.load(lab / "runs" / n / "checkpoints" / "last.ckpt") for n in ("whole", "without"))
    assert not torch.equal(with_it.decode(batch()[0]), without.decode(batch()[0]))


def test_another_teacher_must_decode_the_same_latents(lab: Path) -> None:
    own = ImageDecoder.of(models.load(lab / "encoder"))
    models.save(own, lab / "own")
    assert isinstance(recipe(lab, teacher=str(lab / "own")).teacher, ImageDecoder)
    with refused("latents.encoder", str(lab / "other"), encoder_of(own)):
        recipe(lab, teacher=str(lab / "other"))


def test_latents_of_another_encoder_are_refused(lab: Path) -> None:
    with refused("latents.encoder"):
        owl_here("fit", "--config", "plain.yaml", "--trainer.callbacks.path=other", "--name", "other", cwd=lab)


def test_what_does_not_fit_is_reported(lab: Path) -> None:
    with refused("recipe.arguments", "truth", "1.5"):
        recipe(lab, truth=1.5)
    for name in ("gamma", "noise"):
        with refused("recipe.arguments", f"{name} is -1.0", f"model.init_args.{name}"):
            recipe(lab, **{name: -1.0})
    made = recipe(lab, discriminator=PatchDiscriminator(width=8, layers=2), gamma=2.0)
    made._device_mesh = {"data_parallel": None}  # type: ignore[assignment]
    with refused("trainer.strategy", "gamma is 2.0", "ddp"):
        made.configure_model()
