"""World models that recipes start from: what their files store, and which go together."""

from pathlib import Path

import pytest

from owl import models
from owl.models.world_model import WorldTransformer
from owl.recipes.self_forcing import SelfForcing
from owl.recipes.teachers import check_same, check_stride, forcing_of
from owl.rollout.loading import check_causal, load_source
from tests.helpers.autoencoders import save_autoencoder
from tests.helpers.errors import refused
from tests.helpers.latents import TINY, dot_experiment, lively, make_latents, streams
from tests.helpers.tiny import owl_here, write_config


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    make_latents(folder / "data", (12, 12, 12, 12))
    for name, own in (("causal", {}), ("bidirectional", {"forcing": "full"})):
        experiment = dot_experiment(Path("data"), max_steps=1, limit_val_batches=0)
        experiment["model"]["init_args"] |= own
        experiment["data"]["init_args"] |= {"stride": 2}
        write_config(folder / f"{name}.yaml", experiment)
        assert owl_here("fit", "--config", f"{name}.yaml", "--name", name, cwd=folder) == 0
    assert owl_here("export", checkpoint(folder, "bidirectional"), "exported", cwd=folder) == 0
    models.save(models.load(checkpoint(folder, "bidirectional")), folder / "bare")
    return folder


def checkpoint(lab: Path, name: str) -> str:
    return str(lab / "runs" / name / "checkpoints" / "last.ckpt")


class Strided:
    stride = 1


def test_checkpoints_and_exports_store_how_they_were_trained(lab: Path) -> None:
    source, exported = load_source(checkpoint(lab, "bidirectional")), load_source(str(lab / "exported"), True)
    for loaded in (source, exported):
        assert (loaded.forcing, loaded.stride, loaded.length) == ("full", 2, 5)
    bare = load_source(str(lab / "bare"))
    assert (bare.forcing, bare.stride, bare.length) == (None, None, None)
    assert source.network.training
    assert (source.network.checkpoint, exported.network.checkpoint) == (False, True)
    assert forcing_of(source, None) == forcing_of(bare, "full") == "full"
    with refused("recipe.teacher", "forcing", "bare"):
        forcing_of(bare, None)
    with refused("recipe.teacher", "forcing is teacher", "with full"):
        forcing_of(source, "teacher")
    check_stride(bare, Strided(), "teacher")
    with refused("network.stride", "stride 2", "has 1", "data.init_args.stride to 2"):
        check_stride(source, Strided(), "teacher")


def test_a_student_is_causal_and_its_teacher_where_it_must_be(lab: Path) -> None:
    both = [checkpoint(lab, name) for name in ("causal", "bidirectional")]
    made = SelfForcing(*both, gradient_frames=2)
    assert not made.causal
    assert made.rollouts.window == 5  # the clips of the teacher
    with refused("recipe.teacher", "student", "full", "bidirectional"):
        SelfForcing(*reversed(both))
    check_causal(load_source(both[0]), "student")


def changed(name: str) -> WorldTransformer:
    """A tiny world model that differs in one respect."""
    network = lively(**{"buttons": ["JUMP", *TINY["buttons"][1:]]} if name == "controls" else {})
    if name == "streams":
        network = lively(**streams("audio"))
    elif name == "encoder":
        network.video_encoder += 1
    elif name == "statistics":
        network.video_std *= 2
    return network


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("controls", ["buttons (JUMP", "ATTACK"]),
        ("streams", ["streams", "audio [2, 3] generated"]),
        ("encoder", ["encoder of video", "0101010101010101"]),
        ("statistics", ["mean and std of video"]),
    ],
)
def test_world_models_of_other_latents_or_controls_are_refused(tmp_path: Path, name: str, tokens: list[str]) -> None:
    models.save(lively(), tmp_path / "student")
    models.save(lively(seed=1, width=64), tmp_path / "larger")
    models.save(changed(name), tmp_path / name)
    student = load_source(str(tmp_path / "student"))
    check_same(student, load_source(str(tmp_path / "larger")), "teacher")
    with refused("recipe.teacher", f"teacher {tmp_path / name}", f"student {tmp_path / 'student'}", *tokens):
        check_same(student, load_source(str(tmp_path / name)), "teacher")


def test_other_networks_are_refused(tmp_path: Path) -> None:
    path = save_autoencoder(tmp_path / "autoencoder")
    with refused("network.kind", "ImageAutoencoder"):
        load_source(str(path))
