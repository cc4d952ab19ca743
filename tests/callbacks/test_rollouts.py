"""Rollouts while training: what they log and draw, with which weights, and what they refuse."""

import json
import math
from contextlib import chdir
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from owl import models
from owl.callbacks.rollouts import Rollouts
from owl.data.shards import DatasetInfo
from owl.losses.lpips import LPIPS
from owl.models.sampling import Sampling
from owl.models.world_model import WorldTransformer
from owl.rollout.engine import Engine
from owl.rollout.episodes import Episodes, load_decoder
from owl.rollout.evaluation import horizon_curves, roll_out
from owl.rollout.generate import Schedule
from tests.helpers.errors import refused
from tests.helpers.ranks import owl_on_two
from tests.helpers.tiny import owl_here, tiny_experiment, write_config
from tests.helpers.world import AUTOENCODER, FOOTAGE, INVERSE_DYNAMICS, LATENTS, STRIDE, make_world, tiny_world_model

CONTEXT, HORIZON = 3, 5


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("rollouts"))


def callback(**settings: Any) -> dict[str, Any]:
    given = {"decoder": AUTOENCODER, "clips": 2, "context": CONTEXT, "horizon": HORIZON}
    return {"class_path": "owl.callbacks.rollouts.Rollouts", "init_args": given | settings}


def fit(lab: Path, name: str, trainer: dict[str, Any], *options: str, **settings: Any) -> dict[str, float]:
    configuration = tiny_world_model(LATENTS, **{"max_steps": 4, "callbacks": [callback(**settings)], **trainer})
    configuration["model"]["init_args"]["network"]["init_args"]["sampling"] = {"steps": 2}
    configuration["ema"] = {"decay": 0.9}
    write_config(lab / f"{name}.yaml", configuration)
    assert owl_here("fit", "--config", f"{name}.yaml", "--name", name, *options, cwd=lab) == 0
    return json.loads((lab / "runs" / name / "metrics.json").read_text())


EVERY = {"val_check_interval": 1, "check_val_every_n_epoch": None, "limit_val_batches": 1}


def test_the_averaged_weights_are_rolled_out(lab: Path) -> None:
    metrics = fit(lab, "once", {}, "--model.init_args.optimizer.init_args.lr", "0.2")
    names = [f"val/rollout_{side}{kind}_{h}" for side in ("", "repeat_") for kind in ("psnr", "lpips") for h in (1, 4)]
    assert sorted(name for name in metrics if "rollout" in name) == sorted(names)
    checkpoint = lab / "runs/once/checkpoints/last.ckpt"
    network = models.load(checkpoint)
    assert isinstance(network, WorldTransformer)
    averaged = by_hand(lab, network)
    assert {name: metrics[name] for name in names} == pytest.approx(averaged, rel=2e-3)
    raw = torch.load(checkpoint, weights_only=True)["ema"]["raw"]
    network.load_state_dict({name.removeprefix("network."): weight for name, weight in raw.items()}, strict=False)
    assert by_hand(lab, network)["val/rollout_psnr_4"] != pytest.approx(averaged["val/rollout_psnr_4"], rel=1e-2)


def by_hand(lab: Path, network: WorldTransformer) -> dict[str, float]:
    """What the callback should log of these weights."""
    with chdir(lab):
        engine = Engine(network, {"video": load_decoder(AUTOENCODER)}, **vars(Schedule.of(network.sampling)))
        length = CONTEXT + HORIZON
        episodes = Episodes(
            LATENTS, DatasetInfo.load(LATENTS), "validation", network, engine.decoders["video"], STRIDE, length
        )
        curves = horizon_curves(roll_out(engine, episodes, episodes.windows(2), CONTEXT), LPIPS())
    return {f"val/rollout_{name}_{h}": values[h - 1] for name, values in curves.items() for h in (1, 4)}


def test_controls_are_read_back_and_drift_is_measured_of_a_few_step_student(lab: Path) -> None:
    student = [f"--model.init_args.network.init_args.sampling.{key}" for key in ("sampler=consistency", "shift=3.0")]
    metrics = fit(lab, "more", {}, *student, inverse_dynamics=INVERSE_DYNAMICS, frames=6, side_by_side=2)
    for name in ("action_accuracy", "action_accuracy_true", "fd_efficientnet_lite0_1_3", "drift"):
        assert math.isfinite(metrics[f"val/rollout_{name}"])
    distances = [metrics[f"val/rollout_fd_efficientnet_lite0_{part}"] for part in ("1_3", "4_6")]
    assert metrics["val/rollout_drift"] == pytest.approx(distances[1] / distances[0], rel=1e-4)
    network = models.load(lab / "runs/more/checkpoints/last.ckpt")
    assert isinstance(network, WorldTransformer)
    assert network.sampling == Sampling(2, 3.0, "consistency")
    found = by_hand(lab, network)
    assert metrics["val/rollout_psnr_4"] == pytest.approx(found["val/rollout_psnr_4"], rel=2e-3)


def test_every_nth_validation_is_drawn_also_after_a_resume(lab: Path) -> None:
    fit(lab, "second", EVERY | {"max_steps": 3}, every_n_validations=2)
    folder = lab / "runs" / "second"
    files = sorted((folder / "media").rglob("rollout.png"))
    assert [file.parent.name for file in files] == ["step-0000001", "step-0000003"]
    assert cv2.imread(str(files[0])).shape[2] == 3
    events = EventAccumulator(str(folder), {"images": 0})
    events.Reload()
    assert [image.step for image in events.Images("rollout")] == [1, 3]
    assert [scalar.step for scalar in events.Scalars("val/rollout_psnr_4")] == [0, 2]  # Lightning counts so
    fit(lab, "second", EVERY | {"max_steps": 5}, "--ckpt_path", "last", every_n_validations=2)
    drawn = sorted(path.parent.name for path in (folder / "media").rglob("rollout.png"))
    assert drawn == ["step-0000001", "step-0000003", "step-0000005"]


def test_training_is_the_same_with_and_without(lab: Path) -> None:
    fit(lab, "with", EVERY)
    fit(lab, "without", EVERY | {"callbacks": []})
    weights = [
        torch.load(lab / f"runs/{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("with", "without")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_validate_rolls_out_too(lab: Path) -> None:
    trained = fit(lab, "measured", {})
    arguments = ("--config", "measured.yaml", "--name", "measured", "--ckpt_path", "last")
    assert owl_here("validate", *arguments, cwd=lab) == 0
    measured = json.loads((lab / "runs/measured/validate.json").read_text())
    for name in ("val/rollout_psnr_4", "val/rollout_repeat_lpips_1"):
        assert measured[name] == pytest.approx(trained[name], rel=1e-5)


def test_two_processes_log_what_one_does(lab: Path) -> None:
    fit(lab, "alone", {})
    found = []
    impatient = callback() | {"class_path": "tests.helpers.world.ImpatientRollouts"}
    write_config(lab / "impatient.yaml", {"trainer": {"callbacks": [impatient]}})
    for more in ([], ["--config", "impatient.yaml", "--trainer.devices", "2", "--trainer.strategy", "ddp"]):
        arguments = ["--config", "alone.yaml", "--name", "alone", "--ckpt_path", "last", *more]
        if more:
            owl_on_two("validate", *arguments, cwd=lab)
        else:
            assert owl_here("validate", *arguments, cwd=lab) == 0
        found.append(json.loads((lab / "runs/alone/validate.json").read_text()))
    one, two = ({name: v for name, v in each.items() if name.startswith("val/rollout")} for each in found)
    assert len(one) == 8
    assert two == pytest.approx(one, rel=2e-3)


@pytest.mark.parametrize(
    ("settings", "code", "tokens"),
    [
        ({"decoder": INVERSE_DYNAMICS}, "network.kind", [INVERSE_DYNAMICS, "InverseDynamicsModel", "an autoencoder"]),
        ({"decoder": "other/last.ckpt"}, "checkpoint.missing", ["other/last.ckpt"]),
        ({"horizon": 60}, "windows.too-short", ["125 frames"]),
    ],
)
def test_what_does_not_fit_is_reported_before_training(
    lab: Path, settings: dict[str, Any], code: str, tokens: list[str]
) -> None:
    with refused(code, *tokens):
        fit(lab, f"refused-{code}", {}, **settings)


def test_a_recipe_without_a_world_model_is_refused(lab: Path) -> None:
    configuration = tiny_experiment(Path(FOOTAGE), callbacks=[callback()])
    (lab / "vae.yaml").write_text(yaml.safe_dump(configuration))
    with refused("rollouts.recipe", "ImageVAE"):
        owl_here("fit", "--config", "vae.yaml", "--name", "vae", cwd=lab)


@pytest.mark.parametrize("name", ["every_n_validations", "clips", "horizon", "context", "side_by_side"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with refused("arguments.too-small", f"{name} is 0", "at least 1"):
        Rollouts("decoder.ckpt", **{name: 0})
