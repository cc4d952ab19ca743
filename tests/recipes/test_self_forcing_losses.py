"""Options of self forcing: score identity, a discriminator, and frames after the dataset's instead of its own."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from owl import models
from owl.models.discriminators import ResNetDiscriminator
from owl.models.image_decoder import ImageDecoder
from owl.models.world_model import WorldTransformer
from owl.recipes.presentation import Presentation
from owl.recipes.self_forcing import CRITIC, FRAMES, STUDENT, SelfForcing
from owl.recipes.student_adversary import Adversary
from owl.rollout import checks
from tests.helpers.errors import refused
from tests.helpers.latents import LATENT
from tests.helpers.students import RATE, batches, make_lab, moved, recipe, trained, weights

K = 2  # frames with gradients


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lab(tmp_path_factory.mktemp("losses"))


def adversary(**changes: Any) -> Adversary:
    torch.manual_seed(0)
    discriminator = ResNetDiscriminator(channels=LATENT[0], widths=[8, 8], blocks=[1, 1], patch=1, group_size=4)
    settings: dict[str, Any] = {"weight": 0.5, "ramp": 0, "gamma": 0.1, "penalty_every": 1}
    return Adversary(discriminator, optimizer=lambda p: SGD(p, lr=RATE), **settings | changes)


def to_x0(shown: Presentation, network: WorldTransformer, x_t: dict[str, Tensor], null: bool = False) -> list[dict]:
    """The predictions of x0 of the scored frames, from given noisy ones."""
    at, t = replace(shown, x=x_t), shown.noise_level[:, -K:]
    return [
        {n: x_t[n][:, -K:] - t.view(*t.shape, *[1] * (v.ndim - 2)) * v for n, v in velocity.items()}
        for velocity in at.velocities(network, null=null)
    ]


def generated_by(made: SelfForcing, student: WorldTransformer, data: dict[str, Tensor]) -> Any:
    latents, controls = made.inputs(data)
    rollouts, of = replace(made.rollouts, network=student), made.generators(data, 0)
    return rollouts(latents, controls, rollouts.plan(0), lambda frame: of(FRAMES + frame), grad=True)


@pytest.mark.parametrize("forcing", ["teacher", "full"])
def test_score_identity_flows_through_both_networks_to_the_scored_frames_alone(
    lab: Path, tmp_path: Path, forcing: str
) -> None:
    (data,) = batches(1)
    made = recipe(lab, critic_steps=1, forcing=forcing, matching="sid", sid_alpha=1.2)
    student, critic, teacher = (copy.deepcopy(n) for n in (made.network, made.critic, made.teacher))
    before = weights(student)
    trained(made, [data], tmp_path)
    generated = generated_by(made, student, data)
    shown = made.present(generated, made.generators(data, 0)(STUDENT))
    noisy, t = {}, shown.noise_level
    for name, x in generated.last.items():
        clean = torch.cat([shown.clean[name][:, : t.shape[1] - K], x], 1)
        level = t.view(*t.shape, *[1] * (x.ndim - 2))
        noisy[name] = (1 - level) * clean + level * shown.noise[name]
    (fake,) = to_x0(shown, critic, noisy)
    conditional, null = to_x0(shown, teacher, noisy, null=True)
    loss = torch.zeros(())
    for name, x in generated.last.items():
        real = 2.5 * conditional[name] - 1.5 * null[name]
        size = (x - real).abs().flatten(1).mean(1).detach().view(-1, *[1] * (x.ndim - 1))
        difference = real - fake[name]
        loss = loss + (difference * (real - x - 1.2 * difference) / size).mean()
    for name, expected in zip(before, torch.autograd.grad(loss, list(student.parameters())), strict=True):
        torch.testing.assert_close(moved(made.network, before)[name], expected, rtol=2e-3, atol=2e-4)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), made.teacher.parameters(), strict=True))


def test_the_discriminator_and_the_student_learn_what_the_equations_say(lab: Path, tmp_path: Path) -> None:
    (data,) = batches(1)
    made = recipe(lab, critic_steps=1, matching_weight=0.0, adversary=adversary())
    student, judge = copy.deepcopy(made.network), copy.deepcopy(made.adversary.discriminator)
    before = weights(student), {name: p.detach().clone() for name, p in judge.named_parameters()}
    trained(made, [data], tmp_path)
    generated = generated_by(made, student, data)
    end = 2 + made.rollouts.plan(0).frames  # context and rollout
    true = made.inputs(data)[0]["video"][:, end - K : end].flatten(0, 1)
    fake = generated.last["video"].flatten(0, 1)
    loss = 0.5 * F.softplus(judge(true) - judge(fake)).mean()
    slopes = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
    for name, slope in zip(before[0], slopes, strict=True):
        found = moved(made.network, before[0])[name]
        torch.testing.assert_close(found, torch.zeros_like(found) if slope is None else slope, rtol=2e-3, atol=1e-4)
    sides = [x.detach().requires_grad_() for x in (true, fake)]
    logits = [judge(x) for x in sides]
    slopes = [torch.autograd.grad(y.sum(), x, create_graph=True)[0] for x, y in zip(sides, logits, strict=True)]
    penalty = sum(slope.square().flatten(1).sum(1).mean() for slope in slopes)
    loss = F.softplus(logits[1] - logits[0]).mean() + 0.1 / 2 * penalty
    expected = torch.autograd.grad(loss, list(judge.parameters()))
    for (name, p), slope in zip(made.adversary.discriminator.named_parameters(), expected, strict=True):
        torch.testing.assert_close((before[1][name] - p) / RATE, slope, rtol=2e-3, atol=1e-4)


def test_a_decoder_is_searched_and_not_changed(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = models.load(lab / "sound")
    decoder = ImageDecoder(
        channels=3,
        size=[16, 24],
        latent_size=[4, 6],
        latent_channels=LATENT[0],
        widths=[8, 8],
        blocks=[1, 1],
        patch=2,
        group_size=4,
    )
    models.save(decoder, lab / "decoder")
    judge = ResNetDiscriminator(channels=3, widths=[8, 8], blocks=[1, 1], group_size=4)
    looking = Adversary(judge, ramp=4, weight=2.0, decoder=str(lab / "decoder"))
    monkeypatch.setattr(checks.latents, "check_decoder", lambda *_: None)  # of no encoder
    looking.check(network)
    true, generated = torch.randn(2, 1, K, *LATENT)
    loss, slope = looking.gradient(network, true, generated, step=0)
    x = generated.clone().requires_grad_()
    pictures = [decoder.decode(network.restore({"video": y})["video"].flatten(0, 1)) for y in (true, x)]
    expected = F.softplus(judge(pictures[0]) - judge(pictures[1])).mean()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(slope, 2.0 / 4 * torch.autograd.grad(expected, x)[0], rtol=1e-4, atol=1e-7)
    assert not any("decoder" in name for name in looking.state_dict())
    assert all(p.grad is None for p in looking.parameters())
    with refused("recipe.arguments", "takes 3 channels", "expected 2"):
        Adversary(judge).check(network)


def test_two_passes_and_recomputation_change_no_weight_with_any_loss(lab: Path, tmp_path: Path) -> None:
    both: dict[str, Any] = {"matching": "sid", "guidance": 1.0}
    plain, other = (
        trained(recipe(lab, **both, adversary=adversary(), **own), batches(2), tmp_path)
        for own in ({}, {"two_passes": True, "checkpoint": True})
    )
    for name, p in plain.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), p, atol=1e-5, rtol=1e-4)
    assert not torch.equal(plain.network.video_in.weight, recipe(lab).network.video_in.weight)


@pytest.mark.parametrize("forcing", ["teacher", "full"])
def test_without_self_rollout_frames_follow_those_of_the_dataset(lab: Path, tmp_path: Path, forcing: str) -> None:
    (data,) = batches(1)
    made = recipe(lab, self_rollout=False, forcing=forcing)
    latents, controls = made.inputs(data)
    plan, of = made.rollouts.plan(0), made.generators(data, 0)
    generated = made.roll_out(latents, controls, plan, of, grad=True)
    end = 2 + plan.frames
    assert generated.end == end
    changed = {name: x.clone() for name, x in latents.items()}
    for x in changed.values():
        x[:, end - 1] += 1
    later = made.roll_out(changed, controls, plan, of, grad=True)
    assert torch.equal(later.last["video"][:, 0], generated.last["video"][:, 0])  # the past alone
    assert not torch.equal(later.last["video"][:, 1], generated.last["video"][:, 1])  # its own noisy frame
    (slope,) = torch.autograd.grad(generated.last["video"][:, 1].sum(), [made.network.video_in.weight])
    assert slope.any()
    shown = made.present(generated, of(CRITIC))
    if forcing == "teacher":  # the teacher is shown the past that the student had
        assert torch.equal(shown.context["video"], latents["video"][:, end - 4 : end])  # type: ignore[index]
    assert torch.equal(shown.clean["video"][:, -K:], generated.last["video"].detach())
    before = weights(made.network)
    trained(made, batches(2), tmp_path)
    assert any(step.any() for step in moved(made.network, before).values())


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"matching_weight": 0.0}, ["matching_weight is 0.0", "no adversary"]),
        ({"matching_weight": -1.0}, ["matching_weight is -1.0"]),
        ({"self_rollout": False, "two_passes": True}, ["two_passes is true", "self_rollout"]),
    ],
)
def test_losses_that_make_no_sense_are_refused(lab: Path, changes: dict[str, Any], tokens: list[str]) -> None:
    with refused("recipe.arguments", *tokens):
        recipe(lab, **changes)
    with refused("recipe.arguments", "gamma -1"):
        adversary(gamma=-1)
