"""Post-training: it starts from a trained decoder, a student follows a frozen teacher, and samples carry gradients."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from owl import models
from owl.flow_matching import add_noise, to_interval
from owl.losses.lpips import LPIPS
from owl.models.diffusion_decoder import DiTDecoder
from owl.nn.frozen import trained
from owl.recipes.diffusion_decoder import DiffusionDecoder, Weights
from owl.recipes.post_training import consistency_loss
from tests.helpers.autoencoders import drawn, save_autoencoder, tiny_decoder
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import owl_here, write_config

TINY = {"patch": [8, 8], "width": 32, "depth": 1, "heads": 2, "mlp_ratio": 2.0}
DISTILLED = {"flow": 0.0, "lpips": 0.0, "consistency": 1.0}
PERCEPTUAL = LPIPS()
RECIPE, NETWORK = "owl.recipes.diffusion_decoder.DiffusionDecoder", "owl.models.diffusion_decoder.DiTDecoder"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder, a trained decoder of its latents, and the distillation of that."""
    folder = tmp_path_factory.mktemp("post_training")
    make_dataset(folder / "footage", episodes=4, frames=6, size=(32, 48))
    save_autoencoder(folder / "autoencoder")
    network = {"class_path": NETWORK, "init_args": TINY}
    options = {"network": network, "residual": True, "warmup_steps": 1}
    experiments = {
        "teacher": {"weights": {"lpips": 0.0}},
        "student": {"weights": DISTILLED, "start": "runs/teacher/checkpoints/last.ckpt"},
    }
    for name, own in experiments.items():
        write_config(folder / f"{name}.yaml", tiny_decoder("footage", "autoencoder", RECIPE, **options, **own))
    fit(folder, "teacher", "teacher")
    return folder


def fit(lab: Path, config: str, name: str, *options: str) -> dict[str, Any]:
    limits = ("--trainer.max_steps", "2", "--trainer.limit_val_batches", "0")
    assert owl_here("fit", "--config", f"{config}.yaml", "--name", name, *limits, *options, cwd=lab) == 0
    content: dict[str, Any] = torch.load(lab / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)
    return content


def recipe(lab: Path, weights: dict[str, float], start: DiTDecoder | str | None = None, **changes: Any) -> Any:
    """A recipe without a trainer, whose layers all do something; a network in ``start`` is saved first."""

    def network(*geometry: Any) -> DiTDecoder:
        return DiTDecoder(*geometry, **TINY | changes)

    if isinstance(start, DiTDecoder):
        models.save(start, lab / "start")
        start = str(lab / "start")
    torch.manual_seed(0)
    made = DiffusionDecoder(
        str(lab / "autoencoder"), network, start=start, weights=Weights(**weights), lpips=PERCEPTUAL, sample_steps=3
    )
    if start is None:
        with torch.no_grad():
            for name, parameter in trained(made.network).items():
                parameter.copy_(torch.randn(parameter.shape) * 0.1 + name.endswith("norm.weight"))
    return made


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "rgb": torch.randint(0, 256, (4, 1, 3, 32, 48), dtype=torch.uint8, generator=generator),
        "latent": torch.randn(4, 1, 4, 4, 6, generator=generator),
        "window": torch.arange(4),
    }


def losses(made: DiffusionDecoder) -> dict[str, Tensor]:
    data = batch()
    image, latent = data["rgb"].flatten(0, 1) / 127.5 - 1, data["latent"].flatten(0, 1)
    return made.losses(image, latent, drawn(made, data))[0]


def gradients(made: DiffusionDecoder, term: str) -> dict[str, Tensor]:
    made.zero_grad()
    losses(made)[term].backward()
    return {name: parameter.grad for name, parameter in trained(made.network).items() if parameter.grad is not None}


@pytest.mark.parametrize("shortcut", [False, True])
def test_gradients_through_all_steps_are_those_without_recomputation(lab: Path, shortcut: bool) -> None:
    made = recipe(lab, {"sample_lpips": 1.0}, shortcut=shortcut, steps=2)
    made.chances = replace(made.chances, bootstrap=0.0)
    calls = []
    made.network.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    plain = gradients(made, "sample_lpips")
    evaluations = len(calls)
    assert evaluations == 1 + (2 if shortcut else 3)
    made.network.checkpoint = True
    recomputed = gradients(made, "sample_lpips")
    assert len(calls) > 2 * evaluations  # also in the backward pass
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)
    assert plain["target_in.weight"].abs().sum() > 0


class ToPoint:
    """A decoder with the exact flow to one image."""

    point = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def guided(self, x: Tensor, t: Tensor, latent: Tensor, base: Tensor | None) -> Tensor:
        return (x - self.point) / t[:, None, None, None].clamp(min=1e-6)

    __call__ = guided


def test_a_perfect_flow_has_no_consistency_loss_and_another_has() -> None:
    flow, t = ToPoint(), to_interval(torch.tensor([0.01, 0.4, 0.99, 1.0]), 4)
    assert t.tolist() == [0.25, 0.5, 1.0, 1.0]
    x = add_noise(flow.point.expand(4, 3, 4, 4), torch.randn(4, 3, 4, 4), t)
    arguments: Any = (flow, flow, flow.point, x, t, torch.zeros(4), None, 4)
    assert consistency_loss(*arguments) < 1e-8
    assert consistency_loss(arguments[0], arguments[1], flow.point + 1, *arguments[3:]) > 0.9


def test_a_student_starts_as_its_teacher_and_only_the_student_learns(lab: Path) -> None:
    start = recipe(lab, {}).network
    made = recipe(lab, DISTILLED, start)
    for name, tensor in start.state_dict().items():
        assert torch.equal(made.network.state_dict()[name], tensor), name
    assert not trained(made.teacher)
    assert not any(name.startswith("teacher") for name in made.state_dict())
    found = gradients(made, "consistency")
    assert found["target_in.weight"].abs().sum() > 0
    assert all(parameter.grad is None for parameter in made.teacher.parameters())
    with torch.no_grad():
        before = losses(made)["consistency"]
        made.teacher.guidance = 3.0  # the student learns the guided flow
        assert not torch.isclose(losses(made)["consistency"], before)


def test_a_run_that_distils_resumes_exactly_and_its_network_loads_without_the_teacher(lab: Path) -> None:
    whole = fit(lab, "student", "whole")
    fit(lab, "student", "parts", "--trainer.max_steps", "1")
    parts = fit(lab, "student", "parts", "--ckpt_path", "last")
    assert whole["state_dict"].keys() == parts["state_dict"].keys()
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(parts["state_dict"][name], tensor), name
    teacher = lab / "runs" / "teacher" / "checkpoints" / "last.ckpt"
    start = torch.load(teacher, weights_only=True)["state_dict"]
    assert torch.equal(whole["state_dict"]["network.target_std"], start["network.target_std"])  # not measured again
    assert not torch.equal(whole["state_dict"]["network.target_in.weight"], start["network.target_in.weight"])
    teacher.rename(lab / "gone.ckpt")
    models.load(lab / "runs" / "whole" / "checkpoints" / "last.ckpt")
    (lab / "gone.ckpt").rename(teacher)


def test_what_cannot_be_distilled_is_reported(lab: Path) -> None:
    with refused("recipe.arguments", "start"):
        recipe(lab, DISTILLED)
    with refused("recipe.arguments", "shortcut"):
        recipe(lab, DISTILLED, recipe(lab, {}, shortcut=True).network, shortcut=True)
    with refused("recipe.start", "in width;"):
        recipe(lab, {}, recipe(lab, {}).network, width=64)
    with refused("recipe.start", "in prediction;"):
        recipe(lab, {}, recipe(lab, {}).network, prediction="velocity")
    with refused("recipe.start", "ImageAutoencoder"):
        recipe(lab, {}, str(lab / "autoencoder"))


def test_a_decoder_of_other_latents_is_no_start(lab: Path) -> None:
    other = recipe(lab, {}).network
    models.save(other, lab / "other")  # its latents have no encoder
    options = ("--model.init_args.start", "other", "--model.init_args.residual", "false")
    with refused("latents.encoder"):
        owl_here("fit", "--config", "student.yaml", "--name", "x", *options, cwd=lab)
