"""``rollout`` as it is typed: what it leaves behind, its refusals in one sentence, and the how-to page."""

import json
import shlex
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from owl import models
from owl.comparison import world_models
from owl.data.shards import DatasetInfo
from owl.latents import encoder_of, load_latent_stats
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.image_decoder import ImageDecoder
from tests.helpers.decoders import LatentDecoder
from tests.helpers.errors import refused
from tests.helpers.tiny import REPOSITORY, owl_here
from tests.helpers.world import AUTOENCODER, FOOTAGE, INVERSE_DYNAMICS, LATENTS, WORLD_MODEL, make_world
from tests.test_docs import blocks, lines

SMALL = ("--frames", "4", "--clips", "2", "--horizon", "4", "--context", "2", "--side_by_side", "2", "--steps", "2")
SMALL += ("--starts", "0")
FILES = ["comparison.mp4", "drift.png", "horizon.png", "measured.yaml", "metrics.json", "report.md", "rollout.mp4"]
FILES += ["strip.png"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs and datasets named as in the how-to page."""
    return make_world(tmp_path_factory.mktemp("rollout"))


def film(path: Path) -> tuple[Fraction, np.ndarray]:
    """Rate and pictures uint8[T, H, W, 3] of a film."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.average_rate is not None
        return stream.average_rate, np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])


def test_everything_is_measured_drawn_and_filmed(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--data", LATENTS, "--inverse_dynamics", INVERSE_DYNAMICS, "--out", "report", *SMALL)
    assert owl_here("rollout", WORLD_MODEL, *arguments, cwd=lab) == 0
    assert "Report: report/report.md" in capsys.readouterr().out
    out = lab / "report"
    assert sorted(path.name for path in out.iterdir()) == FILES
    measured = yaml.safe_load((out / "measured.yaml").read_text())
    assert measured == {"checkpoint": WORLD_MODEL, "fingerprint": models.fingerprint(models.load(lab / WORLD_MODEL))}
    metrics = json.loads((out / "metrics.json").read_text())
    assert all(isinstance(value, float | int) for value in metrics.values())
    expected = [f"{side}{name}_{h}" for h in (1, 2, 4) for name in ("psnr", "lpips") for side in ("", "repeat_")]
    expected += [
        "action_accuracy",
        "axis_accuracy",
        "axis_accuracy_true",
        "flicker",
        "drift",
        "fd_efficientnet_lite0_true",
    ]
    expected += ["fd_efficientnet_lite0_1_2", "fd_efficientnet_lite0_3_4", "latency_total_p95", "frames_per_second"]
    assert set(expected) <= metrics.keys()
    report = (out / "report.md").read_text()
    for name in ("horizon.png", "drift.png", "strip.png", "comparison.mp4", "rollout.mp4"):
        assert f"]({name})" in report
    assert "decoded by the same autoencoder" in report
    for name in ("horizon", "drift", "strip"):
        assert Image.open(out / f"{name}.png").size[0] > 400
    rate, pictures = film(out / "comparison.mp4")
    assert rate == Fraction(35, 2)  # of the stride that the world model was trained with
    assert len(pictures) == 2 * (2 + 4)
    assert len(film(out / "rollout.mp4")[1]) == 4
    pressed = (np.abs(pictures.astype(int) - [250, 204, 21]).max(-1) < 40).any((1, 2))
    assert pressed.all()  # the camera of this footage never stands still


def test_the_command_in_the_report_repeats_it(lab: Path) -> None:
    assert owl_here("rollout", WORLD_MODEL, "--data", LATENTS, "--out", "once", *SMALL, cwd=lab) == 0
    first = json.loads((lab / "once" / "metrics.json").read_text())
    report = (lab / "once" / "report.md").read_text()
    assert "Not measured. To measure it" in report
    command = next(line for line in report.splitlines() if line.startswith("    python -m owl rollout"))
    assert "--stride 2" in command
    assert owl_here(*shlex.split(command)[3:], "--out", "again", cwd=lab) == 0
    again = json.loads((lab / "again" / "metrics.json").read_text())
    timed = ("latency", "frames_per_second", "seconds")
    assert {n: v for n, v in first.items() if not n.startswith(timed)} == {
        n: v for n, v in again.items() if not n.startswith(timed)
    }
    assert owl_here(*shlex.split(command)[3:], "--out", "other", "--seed", "1", cwd=lab) == 0
    assert json.loads((lab / "other" / "metrics.json").read_text())["psnr_4"] != first["psnr_4"]


def test_an_export_has_the_stride_of_training_or_of_the_option(lab: Path) -> None:
    assert owl_here("export", WORLD_MODEL, "exported", cwd=lab) == 0
    arguments = ("--data", LATENTS, *SMALL, "--frames", "1", "--side_by_side", "1")
    assert owl_here("rollout", "exported", *arguments, cwd=lab) == 0
    assert film(lab / "exported/rollout/rollout.mp4")[0] == Fraction(35, 2)
    assert not (lab / "exported/rollout/drift.png").exists()  # of a single frame
    assert owl_here("rollout", "exported", *arguments, "--stride", "1", cwd=lab) == 0
    assert film(lab / "exported/rollout/rollout.mp4")[0] == 35


def save_decoder(folder: Path, change: float, autoencoder: Path) -> None:
    """Export an autoencoder's decoder with slightly different weights."""
    network = models.load(autoencoder)
    assert isinstance(network, ImageAutoencoder)
    decoder = ImageDecoder.of(network)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1 + change * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    models.save(decoder, folder)


def test_several_decoders_are_compared_on_generated_latents(lab: Path) -> None:
    """The first is measured like the world model itself, a copy of it alike, and one that is worse as worse."""
    for name, change in (("same", 0.0), ("worse", 1.0)):
        save_decoder(lab / name, change, lab / AUTOENCODER)
    decoders = ("--decoder", "runs/quickstart", "same", "worse")
    with refused("dataset.modalities", LATENTS, "no rgb", "3 decoders"):
        owl_here("rollout", WORLD_MODEL, "--data", LATENTS, *decoders, cwd=lab)
    assert owl_here("data", "encode", AUTOENCODER, FOOTAGE, "data/kept", "--keep", "rgb,controls", cwd=lab) == 0
    arguments = ("--data", "data/kept", *SMALL, "--horizon", "2", "--frames", "2", "--out", "several")
    assert owl_here("rollout", WORLD_MODEL, *arguments, *decoders, cwd=lab) == 0
    metrics = json.loads((lab / "several/metrics.json").read_text())
    for side, suffix in (("", ""), ("reconstruction_", "_true")):
        for metric, name in (("psnr", "psnr"), ("lpips", "lpips_st_alex")):
            expected = np.mean([metrics[f"{side}{metric}_{h}"] for h in (1, 2)])
            assert metrics[f"decoder_quickstart_{name}{suffix}"] == pytest.approx(expected, rel=1e-3)
    assert metrics["decoder_quickstart_flicker"] == pytest.approx(metrics["flicker"], rel=0.05, abs=1e-6)
    of = {
        name: {key.removeprefix(f"decoder_{name}_"): value for key, value in metrics.items() if f"r_{name}_" in key}
        for name in ("quickstart", "same", "worse")
    }
    assert of["same"] == pytest.approx(of["quickstart"], rel=1e-3, abs=1e-6)
    assert of["worse"].keys() == of["same"].keys()
    assert of["worse"]["psnr_true"] < of["same"]["psnr_true"]
    report = (lab / "several/report.md").read_text()
    assert f"| worse | {of['worse']['lpips_st_alex']:.3f} |" in report
    assert "](decoders.html)" in report
    assert "](decoders.png)" in report
    assert "--decoder runs/quickstart same worse" in report
    page = (lab / "several/decoders.html").read_text()
    assert page.count("<video") == 2
    assert (lab / "several/decoders.png").exists()


SCRIPTS = """
turn: {moves: [{seconds: 0.1}, {seconds: 0.2, axes: {mouse_x: 12}}]}
shot: {moves: [{seconds: 0.1}, {seconds: 0.1, buttons: [ATTACK]}]}
around: {returns: true, moves: [{seconds: 0.1}, {seconds: 0.2, axes: {mouse_x: 360}}]}
"""


def test_scripts_of_controls_are_played_from_the_same_starts(lab: Path) -> None:
    (lab / "scripts.yaml").write_text(SCRIPTS)
    arguments = ("--data", LATENTS, "--inverse_dynamics", INVERSE_DYNAMICS, *SMALL, "--starts", "2")
    assert owl_here("rollout", WORLD_MODEL, *arguments, "--scripts", "scripts.yaml", "--out", "scripted", cwd=lab) == 0
    metrics = json.loads((lab / "scripted/metrics.json").read_text())
    for name in ("script_turn_mouse_x_accuracy", "script_turn_mouse_x_moved", "script_shot_ATTACK_missed"):
        assert name in metrics
    assert metrics["scripts_accuracy"] == pytest.approx(
        (metrics["script_turn_mouse_x_accuracy"] + metrics["script_shot_ATTACK_accuracy"]) / 2
    )
    assert metrics["revisit_around_frames"] == 4  # of 0.2 seconds at 17.5 frames per second, and the one before
    assert metrics["revisit_lpips"] == metrics["revisit_around_lpips"] > 0
    report = (lab / "scripted/report.md").read_text()
    assert "| turn | mouse_x |" in report
    assert "| around | 4 |" in report
    assert "](revisit.png)" in report
    assert "expected a recording of the random policy" in report  # this footage is no game's
    assert len(film(lab / "scripted/scripts.mp4")[1]) == 2 + 4 + 2 + 2 + 2 + 4
    with refused("rollout.scripts", "walk", "JUMP", "ATTACK"):
        (lab / "other.yaml").write_text("walk: {moves: [{seconds: 1}, {seconds: 1, buttons: [JUMP]}]}")
        owl_here("rollout", WORLD_MODEL, *arguments, "--scripts", "other.yaml", "--out", "refused", cwd=lab)


def test_several_world_models_are_shown_on_one_page(lab: Path) -> None:
    (lab / "exports").mkdir()
    assert owl_here("export", WORLD_MODEL, "exports/student", cwd=lab) == 0
    both = (WORLD_MODEL, "exports/student", "--data", LATENTS, *SMALL, "--out", "both")
    students = ("--steps", "2", "1", "--sampler", "euler", "consistency")
    with refused("network.stride", "exports/student 1", f"{WORLD_MODEL} 2"):
        origin = lab / "exports/student/provenance.yaml"
        origin.write_text(origin.read_text().replace("stride: 2", "stride: 1"))
        owl_here("rollout", *both, *students, cwd=lab)
    with refused("arguments.wrong-value", "steps has 3 values", "2 world models"):
        owl_here("rollout", *both, "--steps", "1", "2", "3", "--stride", "2", cwd=lab)
    with refused("compare.repeated", WORLD_MODEL):
        owl_here("rollout", WORLD_MODEL, *both, "--stride", "2", cwd=lab)
    assert owl_here("rollout", *both, *students, "--stride", "2", cwd=lab) == 0
    metrics = json.loads((lab / "both/metrics.json").read_text())
    assert list(metrics) == ["world_model_quickstart", "student"]
    assert [row["steps"] for row in metrics.values()] == [2, 1]
    alone = ("rollout", "runs/world_model_quickstart", "--data", LATENTS, *SMALL, "--sampler=euler", "--out", "alone")
    assert owl_here(*alone, cwd=lab) == 0
    for name, value in json.loads((lab / "alone/metrics.json").read_text()).items():
        if name.startswith(("psnr", "lpips", "fd", "flicker")):
            assert metrics["world_model_quickstart"][name] == value
            assert name.endswith("_true") or metrics["student"][name] != value
    page = (lab / "both/index.html").read_text()
    assert page.count("<video") == page.count("From top to bottom: truth, world_model_quickstart, student<") == 2
    assert "--steps 2 1" in page
    assert "--sampler euler consistency" in page
    for name in metrics:
        assert (lab / "both" / name / "report.md").exists()


def test_the_command_of_a_page_leaves_shared_worlds_their_own_parts() -> None:
    common = "--data data --out both --frames 10"
    one = f"python -m owl rollout one {common} --decoder one/decoders/a --inverse_dynamics one/reader --steps 2"
    two = f"python -m owl rollout two {common} --decoder two/decoders/b --steps 4"
    assert world_models.command([one, two]) == f"python -m owl rollout one two {common} --steps 2 4"


@pytest.mark.parametrize("page", ["rollout.md", "fp8.md"])
def test_the_how_to_page_from_top_to_bottom(page: str, lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab)
    save_decoder(lab / "runs/gan_decoder_quickstart", 0.3, lab / AUTOENCODER)
    for student in ("few_step_quickstart", "self_forcing_quickstart"):
        (lab / "runs" / student / "checkpoints").mkdir(parents=True, exist_ok=True)
        shutil.copy(lab / WORLD_MODEL, lab / "runs" / student / "checkpoints/last.ckpt")
    for block in blocks(REPOSITORY / "docs" / "how-to" / page):
        for command in lines(block.content) if block.language == "bash" else ():
            words = shlex.split(command)[3:]
            if words[0] == "rollout":
                assert owl_here(*words, *SMALL, cwd=lab) == 0, command
            elif words[:2] == ["data", "encode"]:
                assert owl_here(*words, cwd=lab) == 0, command
    assert (lab / "runs/world_model_quickstart/rollout/report.md").exists()


def test_the_page_on_training_plays_from_python(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab)
    play, train = (b.content for b in blocks(REPOSITORY / "docs/how-to/world-model.md") if b.language == "python")
    names: dict[str, Any] = {}
    exec(play.replace("MOVE_FORWARD", "ATTACK").replace("(1, 1)", "(1, 2)"), names)  # the controls of this footage
    assert names["picture"].shape == (1, 3, 32, 48)
    names["engine"].restore(names["state"])
    exec(train, names)
    assert all(p.grad.isfinite().all() for p in names["network"].video_out.parameters())


@pytest.mark.parametrize(
    ("checkpoint", "arguments", "code", "tokens"),
    [
        (AUTOENCODER, (), "network.kind", [AUTOENCODER, "ImageAutoencoder", "a world model"]),
        ("nothing.ckpt", (), "checkpoint.missing", ["nothing.ckpt"]),
        (WORLD_MODEL, ("--data", FOOTAGE), "dataset.modalities", [FOOTAGE, "no latent", "rgb, controls"]),
        (WORLD_MODEL, ("--frames", "0"), "arguments.too-small", ["frames is 0", "at least 1"]),
        (WORLD_MODEL, ("--steps", "-1"), "arguments.too-small", ["steps is -1", "at least 1"]),
        (WORLD_MODEL, ("--stride", "0"), "arguments.too-small", ["stride is 0", "at least 1"]),
        (
            WORLD_MODEL,
            ("--decoder", INVERSE_DYNAMICS),
            "network.kind",
            [INVERSE_DYNAMICS, "InverseDynamicsModel", "an autoencoder"],
        ),
        (WORLD_MODEL, ("--decoder", "other.ckpt"), "latents.encoder", ["video decoder"]),
        (WORLD_MODEL, ("--inverse_dynamics", WORLD_MODEL), "network.kind", ["WorldTransformer", "InverseDynamics"]),
        (WORLD_MODEL, ("--horizon", "60"), "windows.too-short", [LATENTS, "123 frames"]),
    ],
)
def test_what_does_not_fit_is_reported_in_one_sentence(
    lab: Path, checkpoint: str, arguments: tuple[str, ...], code: str, tokens: list[str]
) -> None:
    if "other.ckpt" in arguments and not (lab / "other.ckpt").exists():
        options = ("--name", "other", "--seed_everything", "7", "--trainer.max_steps", "1")
        assert owl_here("fit", "--config", "quickstart.yaml", *options, cwd=lab) == 0
        shutil.copy(lab / "runs/other/checkpoints/last.ckpt", lab / "other.ckpt")
    with refused(code, *tokens):
        owl_here("rollout", checkpoint, "--data", LATENTS, *SMALL, "--out", "refused", *arguments, cwd=lab)
    assert not (lab / "refused").exists()


def test_a_decoder_plays_without_its_encoder_where_it_names_that_of_the_world_model(lab: Path) -> None:
    decoder = LatentDecoder()
    load_latent_stats(decoder, DatasetInfo.load(lab / LATENTS).modalities, LATENTS)
    models.save(decoder, lab / "decoder")
    arguments = ("rollout", WORLD_MODEL, "--data", LATENTS, *SMALL, "--out", "decoded", "--decoder", "decoder")
    assert owl_here(*arguments, cwd=lab) == 0
    assert (lab / "decoded/report.md").exists()
    decoder.latent_encoder[0] += 1
    models.save(decoder, lab / "decoder")
    with refused("latents.encoder", "video decoder", encoder_of(decoder)):
        owl_here(*arguments, cwd=lab)


def test_a_decoder_that_the_dataset_names_must_be_here(lab: Path, tmp_path: Path) -> None:
    arguments = (lab / WORLD_MODEL, "--data", lab / LATENTS, *SMALL)
    with refused("decoder.missing", LATENTS, AUTOENCODER, "--decoder"):
        owl_here("rollout", *arguments, cwd=tmp_path)
