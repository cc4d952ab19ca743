"""Layer pruning: which layers stay, that idle layers can go, and that the rest learns what the teacher says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from owl import models
from owl.data.shards import DatasetInfo
from owl.latents import load_latent_stats
from owl.models.world_model import WorldTransformer
from owl.recipes.layer_pruning import LayerPruning, kept_layers
from owl.rollout.loading import load_source
from tests.helpers.errors import refused
from tests.helpers.latents import draw, lively, make_latents, streams, tiny_consistency
from tests.helpers.tiny import owl_here, write_config

SOUND, LENGTH = streams("audio"), 4


@pytest.mark.parametrize(
    ("deep", "shallow", "kept"),
    [
        ([6] * 6, [6] * 3, [0, 2, 5]),
        ([6] * 6, [6], [0]),
        ([6] * 6, [6] * 5, [0, 1, 2, 4, 5]),
        ([4, 4, 4, 9] * 2, [4, 4, 4, 9], [0, 2, 5, 7]),  # a layer of a long window takes the place of one
        ([4, 9, 4, 9, 4, 9], [4, 9, 4], [0, 3, 4]),
    ],
)
def test_evenly_spaced_layers_stay_with_the_windows_of_their_places(
    deep: list[int], shallow: list[int], kept: list[int]
) -> None:
    assert kept_layers(deep, shallow) == kept


def idle(block: torch.nn.Module) -> None:
    """Let a layer return what it gets."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()


def recipe(teacher: WorldTransformer, folder: Path, **changes: Any) -> LayerPruning:
    models.save(teacher, folder / "deep")
    settings: dict[str, Any] = {"depth": 2, "forcing": "teacher", "optimizer": lambda p: AdamW(p, lr=3e-3)}
    return LayerPruning(str(folder / "deep"), **settings | changes)


def batch() -> dict[str, Tensor]:
    network = lively(**SOUND)
    latents, _, controls = draw(network, LENGTH, 2)
    stored = {network.latent_modalities[name]: x for name, x in latents.items()}
    return stored | {"buttons": controls.buttons, "axes": controls.axes, "window": torch.arange(2)}


@pytest.mark.parametrize("forcing", ["teacher", "full"])
def test_layers_without_effect_can_go(tmp_path: Path, forcing: str) -> None:
    teacher = lively(**SOUND, depth=4, global_every=0)
    assert any(loss > 1e-3 for loss in recipe(teacher, tmp_path).losses(batch(), 0).values())
    for layer in (1, 2):
        idle(teacher.blocks[layer])
    made = recipe(teacher, tmp_path, forcing=forcing)
    assert len(made.network.blocks) == 2
    for loss in made.losses(batch(), 0).values():
        assert loss.item() == pytest.approx(0, abs=1e-9)


def test_only_the_student_learns_and_it_comes_closer_also_without_controls(tmp_path: Path) -> None:
    made = recipe(lively(**SOUND, depth=3, global_every=0), tmp_path)
    before = [p.clone() for p in made.teacher.parameters()]
    optimizer = made.optimizer(made.network.parameters())
    losses = []
    for _ in range(30):
        loss = torch.stack([*made.losses(batch(), 0).values()]).sum()
        loss.backward()
        assert made.network.controls.unknown.grad is not None
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(p, old) for p, old in zip(made.teacher.parameters(), before, strict=True))


def test_a_shallow_student_is_distilled_from_its_deep_teacher(tmp_path: Path) -> None:
    make_latents(tmp_path / "data")
    teacher = lively()
    load_latent_stats(teacher, DatasetInfo.load(tmp_path / "data").modalities, "data")
    models.save(teacher, tmp_path / "world")
    (tmp_path / "world/provenance.yaml").write_text("forcing: diffusion")
    experiment = tiny_consistency(Path("data"), "world", max_steps=2)
    write_config(tmp_path / "few.yaml", experiment)
    arguments = {"teacher": "world", "depth": 1, "warmup_steps": 1}
    experiment["model"] = {"class_path": "owl.recipes.layer_pruning.LayerPruning", "init_args": arguments}
    write_config(tmp_path / "prune.yaml", experiment)
    assert owl_here("fit", "--config", "prune.yaml", cwd=tmp_path) == 0
    assert json.loads((tmp_path / "runs/prune/metrics.json").read_text())["val/loss"] > 0
    shallow = "runs/prune/checkpoints/last.ckpt"
    assert load_source(str(tmp_path / shallow)).forcing == "diffusion"  # as its teacher
    assert owl_here("fit", "--config", "few.yaml", "--model.student", shallow, cwd=tmp_path) == 0
    network = models.load(tmp_path / "runs/few/checkpoints/last.ckpt")
    assert isinstance(network, WorldTransformer)
    assert len(network.blocks) == 1
    for depth in ("0", "2"):
        with refused("recipe.arguments", f"depth is {depth}", "2 layers", "1 to 1"):
            owl_here("fit", "--config", "prune.yaml", "--name", "refused", "--model.depth", depth, cwd=tmp_path)
