"""A shared world plays on another machine as it does here, and describes itself."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from owl import models
from owl.data.shards import DatasetInfo
from owl.play.learned import LearnedWorld, Sources
from owl.play.log import Action, ActionLog, digest
from owl.play.replay import make_world as world_of
from owl.play.replay import replay
from owl.play.world import Settings
from owl.rollout.loading import load_world_model, origin_of, parts_of
from owl.rollout.shared import SharedWorld
from tests.helpers.errors import refused
from tests.helpers.tiny import owl_here
from tests.helpers.world import AUTOENCODER, INVERSE_DYNAMICS, LATENTS, STRIDE, WORLD_MODEL, make_world, stir

RUN = "runs/world_model_quickstart"
PLAYED = ("--steps", "2", "--shift", "2", "--sampler", "consistency")
SHARED = (
    "--decoder",
    "runs/quickstart",
    "other",
    "--inverse_dynamics",
    INVERSE_DYNAMICS,
    "--frames",
    "12",
    "--scenes",
    "3",
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a world model that was measured, whose frames depend on its controls."""
    folder = make_world(tmp_path_factory.mktemp("sharing"))
    stir(folder / WORLD_MODEL)
    measured = folder / RUN / "rollout"
    measured.mkdir()
    (measured / "metrics.json").write_text(json.dumps({"psnr_1": 21.5, "repeat_psnr_1": 20.25}))
    (measured / "report.md").write_text("# Report\n")
    (measured / "strip.png").write_bytes(b"a picture")
    fingerprint = models.fingerprint(models.load(folder / WORLD_MODEL))
    (measured / "measured.yaml").write_text(yaml.safe_dump({"fingerprint": fingerprint}))
    models.save(models.load(folder / AUTOENCODER), folder / "other")
    (folder / "terms.txt").write_text("For friends.\n")
    return folder


@pytest.fixture(scope="module")
def elsewhere(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The only thing that another machine has: the folder of the world."""
    arguments = (*SHARED, *PLAYED, "--license", "terms.txt")
    assert owl_here("export", RUN, "exports/doom", *arguments, cwd=lab) == 0
    other = tmp_path_factory.mktemp("elsewhere") / "doom"
    shutil.move(lab / "exports/doom", other)
    return other


def played(world: LearnedWorld, start: int) -> list[str]:
    """Digests of a few frames."""
    world.reset(start, 3)
    moves = np.array([[1, 0], [2, -1], [0, 3]], np.float32)
    return [digest(world.step(np.arange(len(world.description.buttons)) == n, moves[n])) for n in range(3)]


def test_the_folder_has_all_that_another_machine_needs(elsewhere: Path) -> None:
    names = {path.relative_to(elsewhere).as_posix() for path in elsewhere.rglob("*") if path.is_file()}
    network = {"model.safetensors", "config.yaml", "provenance.yaml"}
    folders = ("", "decoders/quickstart/", "decoders/other/", "inverse_dynamics/")
    assert names == {
        *(folder + name for folder in folders for name in network),
        *("world.yaml", "README.md", "LICENSE", "starts.png"),
        *(f"evaluation/{name}" for name in ("metrics.json", "report.md", "strip.png")),
        *(f"scenes/{name}" for name in ("dataset.json", "index.npz", "shard-000000.tar")),
    }
    assert (elsewhere / "LICENSE").read_text() == "For friends.\n"
    info = DatasetInfo.load(elsewhere / "scenes")
    assert list(info.modalities) == ["latent", "controls"]
    assert [len(info.splits[split]) for split in ("train", "validation", "test")] == [
        0,
        0,
        2,
    ]  # two fit into its episode


def test_its_frames_are_those_of_the_run(lab: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same scenes, bit for bit, and with the settings of the folder."""
    monkeypatch.chdir(elsewhere.parent)
    there = LearnedWorld(Sources("doom"))
    assert there.settings == Settings(2, 2.0, "consistency", decoder="quickstart")
    assert there.description.name == "doom"
    assert there.description.decoders == ["quickstart", "other"]
    assert there.description.fps == 17.5
    monkeypatch.chdir(lab)
    here = LearnedWorld(Sources(RUN, data=str(elsewhere / "scenes")), steps=2, shift=2.0, sampler="consistency")
    for start in (0, len(here.description.starts) - 1):
        assert played(there, start) == played(here, start)
    assert len(set(played(there, 0))) == 3
    (reference,) = there.references  # for the meters
    assert reference.reader is not None
    frames, episodes = reference.true_frames()
    assert (frames.dtype, frames.shape[1:]) == (torch.uint8, (3, 32, 48))
    assert len(set(episodes.tolist())) == 2
    assert len(frames) == len(episodes)
    assert here.references[0].reader is None


def test_a_log_is_replayed_where_the_folder_is_now(elsewhere: Path, tmp_path: Path) -> None:
    world = LearnedWorld(Sources(str(elsewhere)), steps=1)
    world.reset(1, 0)
    idle, moved = np.zeros(len(world.description.buttons), bool), np.array([2, -1], np.float32)
    action = Action(idle, moved, world.settings, digest(world.step(idle, moved)))
    description = world.description
    gone = {"checkpoint": "/gone", "data": "/gone/scenes", "decoders": ["/gone/decoders/quickstart", "/gone/b"]}
    log = ActionLog(description.origin | gone, description.buttons, list(description.axes), 1, 0, [action])
    shutil.copytree(elsewhere, tmp_path / "moved")
    assert all(frame.same for frame in replay(log, world_of(log, checkpoint=[str(tmp_path / "moved")])))


def test_the_scenes_are_those_of_the_dataset(lab: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab)
    copied, original = (
        LearnedWorld(Sources(RUN, data=data, context=12), steps=1).scenes
        for data in (str(elsewhere / "scenes"), LATENTS)
    )
    assert torch.equal(copied["latent"], original["latent"])
    for name in ("buttons", "axes"):  # those of a first frame do not cover a whole stride
        assert torch.equal(copied[name][:, 1:], original[name][:, 1:])
    assert owl_here("data", "verify", elsewhere / "scenes", cwd=lab) == 0


def test_it_is_measured_without_options(elsewhere: Path) -> None:
    """Also with its own inverse dynamics model, whose stride its export stores."""
    small = ("--frames", "3", "--clips", "2", "--horizon", "3", "--side_by_side", "1", "--starts", "1")
    assert owl_here("rollout", elsewhere, "--out", "out", *small, cwd=elsewhere.parent) == 0
    metrics = json.loads((elsewhere.parent / "out/metrics.json").read_text())
    assert "action_accuracy" in metrics
    report = (elsewhere.parent / "out/report.md").read_text()
    for option in ("--steps 2", "--shift 2", "--sampler consistency", f"--stride {STRIDE}", "--inverse_dynamics"):
        assert option in report
    assert f"--decoder {elsewhere / 'decoders/quickstart'} --" in report  # the first one


def test_the_card_shows_what_was_measured(lab: Path, elsewhere: Path) -> None:
    card = (elsewhere / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "other"
    assert header["license_link"] == "LICENSE"
    fingerprints = [models.fingerprint(models.load(lab / path)) for path in (WORLD_MODEL, AUTOENCODER)]
    for text in ("# doom\n", "21.5", "20.25", "steps 2", "32 x 48", "17.5", "mouse_x", LATENTS, *fingerprints):
        assert text in card
    for target in ("starts.png", "evaluation/strip.png", "evaluation/report.md", "LICENSE"):
        assert f"]({target})" in card
        assert (elsewhere / target).is_file()
    assert Image.open(elsewhere / "starts.png").size[1] > 100


def test_a_second_export_replaces_the_first(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert owl_here("export", WORLD_MODEL, "again/doom", *SHARED, cwd=lab) == 0
    assert (lab / "again/doom/inverse_dynamics").is_dir()
    (lab / "again/doom/step.onnx").write_text("of other weights")
    assert (lab / "again/doom/evaluation/strip.png").is_file()
    file = lab / RUN / "rollout/measured.yaml"
    measured = file.read_text()
    file.write_text("fingerprint: of-another-step")
    bare = ("--decoder", "again/doom/decoders/quickstart", "--frames", "10", "--scenes", "1")
    assert owl_here("export", WORLD_MODEL, "again/doom", *bare, cwd=lab) == 0
    file.write_text(measured)
    assert "of-another-step" in capsys.readouterr().out
    assert "Not measured" in (lab / "again/doom/README.md").read_text()
    assert not (lab / "again/doom/evaluation").exists()
    assert not (lab / "again/doom/inverse_dynamics").exists()
    assert not (lab / "again/doom/step.onnx").exists()
    assert "Apache License" in (lab / "again/doom/LICENSE").read_text()
    assert "license: apache-2.0" in (lab / "again/doom/README.md").read_text()
    _, content = load_world_model(lab / WORLD_MODEL)
    assert origin_of(lab / "again/doom", None) == origin_of(WORLD_MODEL, content)
    assert owl_here("export", WORLD_MODEL, "again/doom", cwd=lab) == 0  # no world, only a network
    parts = parts_of(lab / "again/doom", None)
    assert (parts.data, parts.decoders, parts.stride) == (None, (), STRIDE)


def test_a_world_is_not_exported_into_itself(lab: Path, elsewhere: Path) -> None:
    scenes = (elsewhere / "scenes/index.npz").read_bytes()
    decoder = ("--decoder", elsewhere / "decoders/quickstart", "--frames", "12", "--scenes", "1")
    for source in ((elsewhere,), (WORLD_MODEL, "--data", elsewhere / "scenes")):
        with refused("export.directory", str(elsewhere)):
            owl_here("export", source[0], elsewhere, *source[1:], *decoder, cwd=lab)
    assert (elsewhere / "scenes/index.npz").read_bytes() == scenes
    assert SharedWorld.find(elsewhere) is not None


@pytest.mark.parametrize(
    ("arguments", "code", "tokens"),
    [
        ((RUN, "out", "--scenes", "3"), "export.world", ["--scenes", "--decoder"]),
        ((RUN, "out", "--decoder", "runs/quickstart", "--frames", "4"), "arguments.too-small", ["frames", "8"]),
        ((RUN, "out", "--decoder", "runs/quickstart", "--frames", "400"), "windows.too-short", ["40"]),
        ((RUN, "out", "--decoder", "runs/quickstart", "--steps", "0"), "sampling.settings", ["steps is 0"]),
        ((RUN, "out", "--decoder", "runs/quickstart", "--license", "none.txt"), "export.license", ["none.txt"]),
        ((RUN, "out", "--decoder", INVERSE_DYNAMICS), "network.kind", ["InverseDynamicsModel"]),
        (("runs/quickstart", "out", "--decoder", "runs/quickstart"), "network.kind", ["a world model"]),
        (
            (RUN, "out", "--decoder", "runs/quickstart", "--audio_decoder", "runs/quickstart"),
            "decoder.stream",
            ["audio"],
        ),
    ],
)
def test_what_cannot_be_shared_is_reported(lab: Path, arguments: tuple[str, ...], code: str, tokens: list[str]) -> None:
    with refused(code, *tokens):
        owl_here("export", *arguments, cwd=lab)
    assert not (lab / "out" / "world.yaml").exists()


def test_a_folder_that_is_damaged_or_foreign_is_reported(elsewhere: Path, tmp_path: Path) -> None:
    assert SharedWorld.find(tmp_path) is None
    content = yaml.safe_load((elsewhere / "world.yaml").read_text())
    shutil.copytree(elsewhere, tmp_path / "doom")
    file = tmp_path / "doom" / "world.yaml"
    for change, code, *tokens in (
        ({"version": 2, "decoders": None}, "world.version", "version 2", "version 1"),
        ({"decoders": None}, "world.damaged", "iterable"),
        ({"decoders": []}, "world.damaged", "decoders"),
        ({"decoders": ["../../quickstart"]}, "world.damaged", "../../quickstart"),
    ):
        file.write_text(yaml.safe_dump(content | change))
        with refused(code, str(file), *tokens):
            SharedWorld.find(tmp_path / "doom")
    file.write_text(yaml.safe_dump(content))
    (tmp_path / "doom/provenance.yaml").write_text("- a list")
    with refused("export.config", "provenance.yaml"):
        LearnedWorld(Sources(str(tmp_path / "doom")))


def test_only_trusted_classes_are_built(elsewhere: Path, tmp_path: Path) -> None:
    shutil.copytree(elsewhere, tmp_path / "doom")
    config = tmp_path / "doom/decoders/quickstart/config.yaml"
    config.write_text(yaml.safe_dump({"class_path": "antigravity.Flight", "init_args": {}}))
    with refused("network.untrusted", str(config), "antigravity.Flight"):
        LearnedWorld(Sources(str(tmp_path / "doom")))
