"""Self forcing: what each network learns from, when, and from nothing else; exact resumes; what is refused."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.optim import SGD

from owl import models
from owl.models.world_model import WorldTransformer
from owl.recipes import memory
from owl.recipes.self_forcing import CRITIC, FRAMES, STUDENT
from owl.rollout.loading import load_source
from tests.helpers.errors import refused
from tests.helpers.latents import LATENT, make_latents
from tests.helpers.students import batches, make_lab, moved, recipe, trained, weights
from tests.helpers.tiny import owl_here


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lab(tmp_path_factory.mktemp("self_forcing"))


@pytest.mark.parametrize("forcing", ["teacher", "full"])
def test_both_networks_learn_what_the_equations_say(lab: Path, tmp_path: Path, forcing: str) -> None:
    (data,) = batches(1)
    made = recipe(lab, critic_steps=1, forcing=forcing)
    student, critic, teacher = (copy.deepcopy(n) for n in (made.network, made.critic, made.teacher))
    before = weights(student), weights(critic)
    trained(made, [data], tmp_path)

    latents, controls = made.inputs(data)
    of = made.generators(data, 0)
    rollouts = replace(made.rollouts, network=student)
    generated = rollouts(latents, controls, rollouts.plan(0), lambda frame: of(FRAMES + frame), grad=True)
    shown = made.present(generated, of(STUDENT))
    t = shown.noise_level[:, -2:]
    with torch.no_grad():
        (fake,) = shown.velocities(critic)
        conditional, null = shown.velocities(teacher, null=True)
    loss = torch.zeros(())
    for name, stream in student.generated.items():
        level = t.view(*t.shape, *[1] * len(stream.shape))
        x_t = shown.x[name][:, -2:]
        real = (x_t - level * conditional[name]) * 2.5 - 1.5 * (x_t - level * null[name])
        x = generated.last[name]
        size = (x.detach() - real).abs().flatten(1).mean(1).view(-1, *[1] * (x.ndim - 1))
        g = (x_t - level * fake[name] - real) / size
        loss = loss + (x * g).sum() / g.numel()
    for name, expected in zip(before[0], torch.autograd.grad(loss, list(student.parameters())), strict=True):
        torch.testing.assert_close(moved(made.network, before[0])[name], expected, rtol=1e-3, atol=1e-4)

    shown = made.present(generated, of(CRITIC))
    (velocity,) = shown.velocities(critic)
    error = torch.stack(
        [(v - (shown.noise[n] - shown.clean[n])[:, -2:]).square().mean() for n, v in velocity.items()]
    ).sum()
    slopes = torch.autograd.grad(error, list(critic.parameters()), allow_unused=True)
    for name, slope in zip(before[1], slopes, strict=True):
        expected = torch.zeros(()) if slope is None else slope
        found = moved(made.critic, before[1])[name]
        torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-3, atol=1e-4)


class Stepped(Callback):
    """Notes which optimiser is stepped."""

    def __init__(self) -> None:
        self.order = ""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for name, optimizer in zip("sc", trainer.optimizers, strict=True):
            optimizer.register_step_pre_hook(lambda *_, n=name: setattr(self, "order", self.order + n))


def test_five_steps_of_the_critic_go_with_one_of_the_student(lab: Path, tmp_path: Path) -> None:
    stepped = Stepped()
    trained(recipe(lab, critic_steps=5), batches(10), tmp_path, stepped)
    assert stepped.order == "ccccsc" * 2


def test_a_step_of_the_student_touches_neither_teacher_nor_critic(lab: Path, tmp_path: Path) -> None:
    with_it, without = (trained(recipe(lab, critic_steps=n), batches(1), tmp_path) for n in (1, 2))
    still = recipe(lab)
    for a, b in zip(with_it.critic.parameters(), without.critic.parameters(), strict=True):
        assert torch.equal(a, b)
    for made in (with_it, without):
        assert all(
            torch.equal(a, b) for a, b in zip(made.teacher.parameters(), still.teacher.parameters(), strict=True)
        )
        assert all(p.grad is None for p in made.teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(without.network.parameters(), still.network.parameters(), strict=True))
    assert not torch.equal(with_it.network.video_in.weight, still.network.video_in.weight)


@pytest.mark.parametrize(
    "changes", [{"two_passes": True}, {"checkpoint": True}, {"two_passes": True, "checkpoint": True}]
)
def test_two_passes_and_recomputation_change_no_weight(lab: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    plain, other = (trained(recipe(lab, **own), batches(4), tmp_path) for own in ({}, changes))
    start = recipe(lab).network
    for name, p in plain.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), p, atol=1e-5, rtol=1e-4)
    assert (plain.network.video_in.weight - start.video_in.weight).abs().max() > 1e-4


def test_accumulation_equals_a_larger_batch(lab: Path, tmp_path: Path) -> None:
    whole = batches(2, size=4)
    parts = [{name: x[i : i + 2] for name, x in data.items()} for data in whole for i in (0, 2)]
    at_once = trained(recipe(lab), whole, tmp_path)
    in_parts = trained(recipe(lab, accumulate=2), parts, tmp_path)
    for name, p in at_once.named_parameters():
        torch.testing.assert_close(in_parts.get_parameter(name), p, atol=1e-5, rtol=1e-4)


def test_streams_are_weighted_separately_for_both_networks(lab: Path, tmp_path: Path) -> None:
    plain, weighted = recipe(lab, critic_steps=1), recipe(lab, critic_steps=1)
    weighted.weights = plain.weights | {"audio": 3.0}
    start = recipe(lab)
    for made in (plain, weighted):
        trained(made, batches(1), tmp_path)
    for network in ("network", "critic"):
        name = f"{network}.audio_out.linear.bias"
        once, thrice = (start.get_parameter(name) - made.get_parameter(name) for made in (plain, weighted))
        torch.testing.assert_close(thrice, 3 * once, rtol=1e-3, atol=1e-6)
        video = f"{network}.video_out.linear.bias"
        assert torch.equal(plain.get_parameter(video), weighted.get_parameter(video))


ADVERSARY = (
    *("--model.adversary", "owl.recipes.student_adversary.Adversary", "--model.adversary.penalty_every", "2"),
    *("--model.adversary.discriminator", "owl.models.discriminators.ResNetDiscriminator"),
    *("--model.adversary.discriminator.channels", str(LATENT[0]), "--model.adversary.discriminator.widths", "[8, 8]"),
    *("--model.adversary.discriminator.blocks", "[1, 1]", "--model.adversary.discriminator.patch", "1"),
    *("--model.adversary.discriminator.group_size", "4"),
)


def fit(lab: Path, name: str, *options: str) -> dict[str, float]:
    assert owl_here("fit", "--config", "tiny.yaml", "--name", name, *options, cwd=lab) == 0
    return json.loads((lab / "runs" / name / "metrics.json").read_text())


def stored(lab: Path, name: str) -> dict[str, Any]:
    return torch.load(lab / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_run_resumes_exactly_within_a_cycle_and_its_student_plays_without_the_others(lab: Path) -> None:
    options = ("--model.critic_steps", "3", "--model.final_lr", "1.0", "--ema.decay", "0.9", *ADVERSARY)
    metrics = fit(lab, "whole", "--trainer.max_steps", "7", *options)
    fit(lab, "parts", "--trainer.max_steps", "4", *options)
    fit(lab, "parts", "--trainer.max_steps", "7", "--ckpt_path", "last", *options)
    whole, parts = stored(lab, "whole"), stored(lab, "parts")
    assert whole["state_dict"].keys() == parts["state_dict"].keys()
    assert all(torch.equal(parts["state_dict"][name], x) for name, x in whole["state_dict"].items())
    assert all(torch.equal(parts["ema"]["raw"][name], x) for name, x in whole["ema"]["raw"].items())
    for a, b in zip(whole["optimizer_states"], parts["optimizer_states"], strict=True):
        for number, state in a["state"].items():
            assert all(torch.equal(b["state"][number][name], x) for name, x in state.items())
    steps = [int(next(iter(o["state"].values()))["step"]) for o in whole["optimizer_states"]]
    assert steps == [2, 7, 7]
    assert {name.split(".")[0] for name in whole["state_dict"]} == {"network", "critic", "lag", "adversary"}
    assert {name.split(".")[0] for name in whole["ema"]["raw"]} == {"network"}
    for name in ("val/critic", "val/teacher", "val/critic_lag", "train/critic_video"):
        assert math.isfinite(metrics[name])
    assert metrics["val/critic_lag"] == pytest.approx(metrics["val/critic"] / metrics["val/teacher"], rel=1e-5)
    network = models.load(lab / "runs" / "whole" / "checkpoints" / "last.ckpt")
    assert isinstance(network, WorldTransformer)
    assert torch.equal(network.video_std, models.load(lab / "world").video_std)
    assert network.sampling.sampler == "consistency"
    # the forcing that is given is the teacher's
    assert load_source(str(lab / "runs" / "whole" / "checkpoints" / "last.ckpt")).forcing is None


def test_a_critic_that_diverges_stops_the_run(lab: Path, tmp_path: Path) -> None:
    wild = recipe(lab, critic_optimizer=lambda p: SGD(p, lr=0.5), critic_steps=2)
    with refused("critic.diverged", "times the teacher's"):
        trained(wild, batches(12), tmp_path)


def test_a_rollout_longer_than_memory_is_reported_before_it_starts(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data,) = batches(1)
    made = recipe(lab)
    latents, controls = made.inputs(data)
    per_frame = made.rollouts.bytes_per_frame(latents, controls, lambda frame: made.generators(data, 0)(frame))
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(1.5 * per_frame))
    stepped = Stepped()
    with refused("rollout.memory", "2 frames", "two_passes"):
        trained(recipe(lab), [data], tmp_path, stepped)
    assert not stepped.order
    trained(recipe(lab, two_passes=True), [data], tmp_path)  # one frame at a time


@pytest.mark.parametrize(
    ("options", "code", "tokens"),
    [
        (["--model.frames", "9"], "recipe.dataset", ["6 frames long", "11 frames"]),
        (["--data.pack", "true"], "recipe.dataset", ["packed", "pack to false"]),
        (["--model.gradient_frames", "5"], "recipe.arguments", ["gradient_frames is 5", "frames is 4"]),
        (["--model.window", "1"], "recipe.arguments", ["gradient_frames is 2", "window is 1"]),
        (["--model.forcing", "null"], "recipe.teacher", ["world", "forcing"]),
        (["--model.critic", "sound"], "recipe.teacher", ["critic sound", "streams"]),
        (["--model.teacher", "sound"], "recipe.teacher", ["sound", "streams", "audio [2, 3] generated"]),
        (["--model.student", "data"], "export.missing", ["data"]),
        (["--model.critic_steps", "0"], "arguments.too-small", ["critic_steps is 0"]),
    ],
)
def test_what_does_not_fit_is_reported(lab: Path, options: list[str], code: str, tokens: list[str]) -> None:
    with refused(code, *tokens):
        fit(lab, "refused", *options)


def test_latents_of_another_encoder_are_refused(lab: Path) -> None:
    make_latents(lab / "foreign", fingerprint="ff00112233445566")
    with refused("latents.encoder", "ff00112233445566"):
        fit(lab, "refused", "--data.path", "foreign")
