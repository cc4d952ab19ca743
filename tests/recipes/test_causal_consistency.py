"""Few-step initialisation: what its target is, that one step learns what many do, exact resumes, what is refused."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from owl import models
from owl.data.shards import DatasetInfo
from owl.latents import load_latent_stats
from owl.models.sampling import Sampling
from owl.models.world_model import WorldTransformer
from owl.recipes.causal_consistency import CausalConsistency
from owl.recipes.presentation import present
from tests.helpers.errors import refused
from tests.helpers.latents import dot_experiment, draw, lively, make_latents, streams, tiny_consistency
from tests.helpers.tiny import owl_here, write_config

SOUND, LENGTH, INTERVALS = streams("audio"), 4, 8


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("consistency")
    make_latents(folder / "data", (12, 12, 12, 12))
    network = lively()
    load_latent_stats(network, DatasetInfo.load(folder / "data").modalities, "data")
    models.save(network, folder / "world")
    models.save(lively(**SOUND), folder / "sound")
    write_config(folder / "tiny.yaml", tiny_consistency(Path("data"), "world"))
    return folder


def recipe(lab: Path, **changes: Any) -> CausalConsistency:
    """A recipe without a trainer, which keeps what it logs in ``logged``."""
    made = CausalConsistency(str(lab / "sound"), **{"intervals": INTERVALS, **changes})
    made.logged = {}
    made.log = lambda name, value, **options: made.logged.update({name: value})
    made.log_dict = lambda values, **options: made.logged.update(values)
    return made


def batch() -> dict[str, Tensor]:
    network = lively(**SOUND)
    latents, _, controls = draw(network, LENGTH, 2)
    stored = {network.latent_modalities[name]: x for name, x in latents.items()}
    return stored | {"buttons": controls.buttons, "axes": controls.axes, "window": torch.arange(2)}


def test_the_target_is_the_student_after_a_step_of_the_guided_teacher(lab: Path) -> None:
    made = recipe(lab, guidance=2.0)
    with torch.no_grad():
        for p in made.network.parameters():
            p.mul_(0.9)
    latents, _, controls = draw(made.network, LENGTH, 2)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    shown = present(latents, controls, LENGTH, True, 0.0, lambda u: (u * 8).ceil() / 8, generators)
    target, t = made.target(shown), shown.noise_level
    following = t - 1 / INTERVALS
    with torch.no_grad():
        conditional, null = shown.velocities(made.teacher, null=True)
        middle = {}
        for name, x in shown.x.items():
            v = null[name] + 2 * (conditional[name] - null[name])
            middle[name] = x - v / INTERVALS
        moved = replace(shown, x=middle, noise_level=following)
        (student,) = moved.velocities(made.network)
    for name, x in middle.items():
        level = following.view(2, LENGTH, *[1] * (x.ndim - 2))
        torch.testing.assert_close(target[name], x - level * student[name], atol=1e-5, rtol=1e-5)
        assert not target[name].requires_grad


def test_only_the_student_learns_and_every_stream_has_its_weight(lab: Path) -> None:
    plain, weighted = recipe(lab), recipe(lab)
    weighted.weights = plain.weights | {"audio": 3.0}
    for made in (plain, weighted):
        made.training_step(batch(), 0).backward()
        assert all(p.grad is None for p in made.teacher.parameters())
    once, thrice = (made.network.audio_out.linear.bias.grad for made in (plain, weighted))
    torch.testing.assert_close(thrice, 3 * once)
    assert torch.equal(plain.network.video_out.linear.bias.grad, weighted.network.video_out.linear.bias.grad)
    assert once.abs().max() > 1e-4
    logged = plain.logged
    torch.testing.assert_close(logged["train/loss"], logged["train/video"] + logged["train/audio"])


def test_recomputation_changes_no_gradient(lab: Path) -> None:
    found = []
    for checkpoint in (False, True):
        made = recipe(lab, checkpoint=checkpoint)
        made.training_step(batch(), 0).backward()
        found.append({name: p.grad for name, p in made.network.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)


def one_step_error(teacher: WorldTransformer, student: WorldTransformer) -> float:
    """How far one step of the student lands from many steps of the teacher, after a clean past."""
    latents, _, controls = draw(teacher, LENGTH, 8, seed=5)
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    noise = present(latents, controls, LENGTH, True, 0.0, torch.ones_like, generators)
    x, steps = noise, 64
    with torch.no_grad():
        for step in range(steps):
            (v,) = x.velocities(teacher)
            level = torch.full_like(x.noise_level, 1 - (step + 1) / steps)
            x = replace(x, x={"video": x.x["video"] - v["video"] / steps}, noise_level=level)
        jump = noise.to_clean(noise.velocities(student)[0])
    return (jump["video"] - x.x["video"]).square().mean().item()


def test_one_step_learns_to_land_where_many_steps_of_the_teacher_do(lab: Path) -> None:
    torch.manual_seed(0)
    made = CausalConsistency(str(lab / "world"), intervals=INTERVALS)
    made.log = made.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    start = copy.deepcopy(made.network)
    optimizer = torch.optim.AdamW(made.network.parameters(), lr=2e-3)
    for number in range(60):
        latents, _, controls = draw(start, LENGTH, 8, seed=100 + number)
        stored = {"latent": start.restore(latents)["video"], "buttons": controls.buttons, "axes": controls.axes}
        optimizer.zero_grad()
        made.training_step(stored | {"window": torch.arange(8) + 8 * number}, 0).backward()
        optimizer.step()
    teacher = made.teacher
    assert one_step_error(teacher, made.network) < 0.6 * one_step_error(teacher, start)


def fit(lab: Path, name: str, *options: str) -> dict[str, float]:
    assert owl_here("fit", "--config", "tiny.yaml", "--name", name, *options, cwd=lab) == 0
    return json.loads((lab / "runs" / name / "metrics.json").read_text())


def test_a_run_resumes_exactly_and_exports_the_student_alone(lab: Path) -> None:
    metrics = fit(lab, "whole", "--model.final_lr", "1.0")
    fit(lab, "parts", "--trainer.max_steps", "2", "--model.final_lr", "1.0")
    fit(lab, "parts", "--ckpt_path", "last", "--model.final_lr", "1.0")
    whole, parts = (
        torch.load(lab / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(parts[name], x) for name, x in whole.items())
    assert {name.split(".")[0] for name in whole} == {"network"}
    assert math.isfinite(metrics["val/loss"])
    assert metrics["val/loss"] == pytest.approx(metrics["val/video"])
    student = models.load(lab / "runs" / "whole" / "checkpoints" / "last.ckpt")
    assert isinstance(student, WorldTransformer)
    assert student.sampling == Sampling(2, 2.0, "consistency")


@pytest.mark.parametrize(
    ("options", "code", "tokens"),
    [
        (["--model.student", "sound"], "recipe.teacher", ["student sound", "streams"]),
        (["--model.intervals", "0"], "arguments.too-small", ["intervals is 0"]),
        (["--data.pack", "true"], "recipe.dataset", ["packed"]),
    ],
)
def test_what_does_not_fit_is_reported(lab: Path, options: list[str], code: str, tokens: list[str]) -> None:
    with refused(code, *tokens):
        fit(lab, "refused", *options)


def test_a_bidirectional_teacher_is_refused(lab: Path) -> None:
    configuration = dot_experiment(Path("data"), max_steps=1, limit_val_batches=0)
    configuration["model"]["init_args"] |= {"forcing": "full"}
    write_config(lab / "full.yaml", configuration)
    assert owl_here("fit", "--config", "full.yaml", "--name", "full", cwd=lab) == 0
    with refused("recipe.teacher", "teacher", "full", "causal"):
        CausalConsistency(str(lab / "runs/full/checkpoints/last.ckpt"))
