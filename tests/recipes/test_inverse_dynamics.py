"""The recipe: what the loss weighs, how clips are augmented, what a run logs and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from owl import models
from owl.models.inverse_dynamics import InverseDynamicsModel
from owl.recipes.inverse_dynamics import Augmentation, InverseDynamics, augment, balanced_cross_entropy, blur, video
from owl.viz.pictures import controls_strip
from tests.helpers.errors import refused
from tests.helpers.shards import AXES, BUTTONS, make_dataset
from tests.helpers.tiny import owl_here, tiny_inverse_dynamics, write_config


def batch(buttons: int = 3, axes: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "rgb": torch.randint(0, 256, (2, 5, 3, 32, 48), generator=generator, dtype=torch.uint8),
        "buttons": (torch.rand(2, 5, buttons, generator=generator) > 0.5).float(),
        "axes": torch.randn(2, 5, axes, generator=generator) * 4,
    }


def recipe(**network: Any) -> InverseDynamics:
    torch.manual_seed(0)
    made = InverseDynamicsModel(**{"buttons": BUTTONS, "axes": AXES, "size": (16, 24), "width": 16} | network)
    return InverseDynamics(made, Augmentation(0, 0, 0))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inverse_dynamics")
    data = make_dataset(folder / "data", frames=8, size=(32, 48), modalities=("rgb", "controls"))
    write_config(folder / "tiny.yaml", tiny_inverse_dynamics(data, max_steps=3))
    return folder


def fit(lab: Path, name: str, *options: str) -> dict[str, float]:
    assert owl_here("fit", "--config", "tiny.yaml", "--name", name, *options, cwd=lab) == 0
    return json.loads((lab / "runs" / name / "metrics.json").read_text())


def test_a_run_logs_every_control_and_draws_it(lab: Path) -> None:
    metrics = fit(lab, "plain")
    for axis in AXES:
        assert 0 <= metrics[f"val/axis_accuracy_{axis}"] <= 1
        assert metrics[f"val/axis_chance_{axis}"] == 1  # each of these episodes moves one way
    assert metrics["val/axis_accuracy"] == pytest.approx(sum(metrics[f"val/axis_accuracy_{a}"] for a in AXES) / 2)
    assert metrics["val/button_accuracy"] == metrics["val/button_accuracy_ATTACK"]  # the others never change
    assert (lab / "runs" / "plain" / "media" / "step-0000003" / "controls.png").exists()
    network = models.load(lab / "runs" / "plain" / "checkpoints" / "last.ckpt")
    assert isinstance(network, InverseDynamicsModel)
    assert network.buttons == BUTTONS
    arguments = ("--config", "tiny.yaml", "--name", "plain", "--ckpt_path", "last")
    assert owl_here("test", *arguments, cwd=lab) == 0
    assert "test/axis_accuracy" in json.loads((lab / "runs" / "plain" / "test.json").read_text())


@pytest.mark.parametrize(
    ("options", "code", "tokens"),
    [
        (
            ["--model.network.buttons", '["MOVE_LEFT", "ATTACK", "MOVE_RIGHT"]'],
            "dataset.controls",
            ["buttons ATTACK, MOVE_LEFT", "has MOVE_LEFT, ATTACK"],
        ),
        (["--model.network.axes", '["mouse_x"]'], "dataset.controls", ["axes mouse_x, mouse_y", "has mouse_x;"]),
        (["--data.modalities", '["rgb"]'], "recipe.dataset", ["frames of rgb,", "[rgb, controls]"]),
        (["--data.length", "1"], "recipe.dataset", ["1 frames of rgb, controls", "at least 2"]),
    ],
)
def test_data_that_does_not_fit_is_reported(lab: Path, options: list[str], code: str, tokens: list[str]) -> None:
    with refused(code, *tokens):
        fit(lab, "unfit", *options)


def test_the_first_frame_teaches_and_measures_nothing() -> None:
    made, data = recipe(), batch()
    other = data | {name: torch.cat([1 - data[name][:, :1], data[name][:, 1:]], 1) for name in ("buttons", "axes")}
    made.log = made.log_dict = lambda *arguments, **options: None
    assert made.training_step(data, 0) == made.training_step(other, 0)
    found = []
    for given in (data, other):
        made.measure(given)
        found.append(made.axis_accuracy.compute() | made.button_accuracy.compute())
        made.axis_accuracy.reset()
        made.button_accuracy.reset()
    assert found[0] == found[1]


def test_both_terms_reach_the_loss_and_either_may_be_absent() -> None:
    logged: dict[str, Tensor] = {}
    for names, terms in (({}, ["axes", "buttons"]), ({"axes": []}, ["buttons"]), ({"buttons": []}, ["axes"])):
        made = recipe(**names)
        logged.clear()
        made.log = lambda name, value, **options: logged.update({name: value})
        made.log_dict = logged.update
        data = batch(len(made.network.buttons), len(made.network.axes))
        loss = made.training_step(data, 0)
        assert sorted(logged) == [*(f"train/{term}" for term in terms), "train/loss"]
        assert loss == logged["train/loss"] == sum(logged[f"train/{term}"] for term in terms)
        assert loss.isfinite()


def test_rare_presses_weigh_as_much_as_common_releases() -> None:
    buttons = torch.zeros(20, 50, 1)
    buttons[0] = 1  # 5% of the frames
    logits = torch.zeros_like(buttons, requires_grad=True)
    balanced_cross_entropy(logits, buttons, torch.tensor([0.05])).backward()
    assert logits.grad is not None
    pressed, released = logits.grad[0].sum().abs(), logits.grad[1:].sum().abs()
    assert 0.5 < pressed / released < 1
    assert balanced_cross_entropy(logits, torch.zeros_like(buttons), torch.zeros(1)).isfinite()  # never pressed


def test_blur_is_a_gaussian_of_each_clip() -> None:
    clips = torch.zeros(2, 1, 3, 21, 21)
    clips[:, :, :, 10, 10] = 1
    blurred = blur(clips, torch.tensor([0.0, 1.5]), largest=1.5)
    torch.testing.assert_close(blurred[0], clips[0])
    spread = blurred[1, 0, 0]
    assert spread.sum().item() == pytest.approx(1, abs=1e-5)
    offset = torch.arange(21.0) - 10
    assert (spread.sum(0) * offset.square()).sum().sqrt().item() == pytest.approx(1.5, rel=0.15)  # cut at 2 sigma
    torch.testing.assert_close(spread, spread.T)


def test_spoiling_changes_each_clip_alike_in_all_frames() -> None:
    torch.manual_seed(0)
    clips = torch.full((4, 3, 3, 16, 16), 0.1)
    brighter = augment(clips, Augmentation(blur=0, noise=0, brightness=0.2))
    assert torch.equal(brighter[:, 0], brighter[:, 2])
    assert len(brighter[:, 0, 0, 0, 0].unique()) == 4
    noisy = augment(clips, Augmentation(blur=0, noise=0.3, brightness=0))
    assert not torch.equal(noisy[:, 0], noisy[:, 1])
    assert len({round(std, 3) for std in noisy.std(dim=(1, 2, 3, 4)).tolist()}) == 4
    assert torch.equal(augment(clips, Augmentation(0, 0, 0)), clips)
    assert augment(torch.ones_like(clips), Augmentation()).abs().max() <= 1


def test_the_film_strip_marks_what_was_misread() -> None:
    clip = video(batch())[:1]
    played = (torch.zeros(1, 5, 3), torch.full((1, 5, 2), 4.0))
    misread = (torch.zeros(1, 5, 3), torch.tensor([4.5, -4.0]).expand(1, 5, 2))
    red = [
        int(((picture[..., 0] > 200) & (picture[..., 1] < 130))[-3 * 18 :].sum())
        for picture in (controls_strip(clip, played, read, BUTTONS, AXES) for read in (played, misread))
    ]
    assert red[0] == 0 < red[1]
