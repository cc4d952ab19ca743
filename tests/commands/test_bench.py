"""``bench`` as it is typed: what it measures is what happens, on its how-to page and beyond."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from owl import models
from owl.bench import roofline
from owl.bench.inference import stages_of
from owl.models.audio_autoencoder import AudioAutoencoder
from owl.models.audio_decoder import AudioDecoder
from owl.models.diffusion_decoder import DiTDecoder
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.image_decoder import ImageDecoder
from owl.recipes.image_vae import ImageVAE, Weights
from tests.helpers.autoencoders import ENCODER
from tests.helpers.errors import refused
from tests.helpers.latents import lively, streams
from tests.helpers.players import tiny_players
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import REPOSITORY, owl_here, tiny_experiment, write_config
from tests.helpers.world import tiny_world_model
from tests.test_docs import blocks, lines

EXPERIMENT = "experiments/quickstart.yaml"
AUTOENCODER = "runs/quickstart/checkpoints/last.ckpt"
WORLD_MODEL = "exports/world_model_quickstart"
SHORT = ("--steps", "2", "--warm_up", "1", "--compile", "false")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment, a run and a world model, named as in the how-to page."""
    folder = tmp_path_factory.mktemp("bench")
    make_dataset(folder / "data", episodes=4, frames=12, size=(32, 48), modalities=("rgb",))
    (folder / "experiments").mkdir()
    experiment = tiny_experiment(Path("data"), precision="bf16-mixed")
    experiment["trainer"] |= {  # none of which takes part
        "max_time": "00:00:00:00",
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}],
    }
    write_config(folder / EXPERIMENT, experiment)
    options = ("--trainer.max_steps", "1", "--trainer.max_time", "null", "--trainer.limit_val_batches", "0")
    assert owl_here("fit", "--config", EXPERIMENT, *options, cwd=folder) == 0
    world_model = lively(**streams(video=(4, 4, 6)))
    encoder = models.fingerprint(models.load(folder / AUTOENCODER).encoder)  # type: ignore[arg-type]
    world_model.video_encoder.copy_(torch.tensor(list(bytes.fromhex(encoder)), dtype=torch.uint8))
    models.save(world_model, folder / WORLD_MODEL)
    return folder


@pytest.fixture(autouse=True)
def small_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of this machine from as little as they can be measured with: what they are does not matter here."""
    monkeypatch.setattr(roofline, "SECONDS_OF_RATE", 0.0)
    monkeypatch.setattr(roofline, "COPIED", 2**20)


def measure(lab: Path, *arguments: str) -> dict[str, Any]:
    """Run bench; return the results by target."""
    assert owl_here("bench", *arguments, *SHORT, "--out", "out.json", cwd=lab) == 0
    results: dict[str, Any] = json.loads((lab / "out.json").read_text())["results"]
    return results


def flops_of_training() -> int:
    """Forward and backward of one batch of the experiment, counted by hand."""
    arguments = tiny_experiment(Path("data"))["model"]["init_args"]["network"]["init_args"]
    recipe = ImageVAE(ImageAutoencoder(**arguments), Weights(lpips=0.0))
    recipe.log = recipe.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    with FlopCounterMode(display=False) as counter:
        recipe.training_step({"rgb": torch.zeros(4, 1, 3, 32, 48, dtype=torch.uint8)}, 0).backward()
    return counter.get_total_flops()


def test_the_how_to_page_from_top_to_bottom(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(lab)
    for block in blocks(REPOSITORY / "docs" / "how-to" / "bench.md"):
        for command in lines(block.content) if block.language == "bash" else ():
            words = shlex.split(command)[3:]
            assert owl_here(*words, *(() if "--compare" in words else SHORT), cwd=lab) == 0, command
    printed = capsys.readouterr().out
    assert "aten::" in printed  # the kernel table
    assert "prediction_rtx5090" in printed
    assert json.loads((lab / "trace.json").read_text())["traceEvents"]
    before, after = (json.loads((lab / name).read_text()) for name in ("before.json", "after.json"))
    assert before["devices"]["cores"] >= 1
    result = before["results"][EXPERIMENT]
    assert (result["kind"], result["precision"], result["compiled"]) == ("training", "bf16", False)
    assert after["results"][EXPERIMENT]["precision"] == "fp32"


def test_what_would_be_ignored_is_reported(lab: Path) -> None:
    with refused("bench.network-option", "--precision", EXPERIMENT, "--trainer.precision"):
        owl_here("bench", EXPERIMENT, "--precision", "bf16", cwd=lab)
    with refused("bench.experiment-option", "--trainer.precision=bf16-mixed", WORLD_MODEL):
        owl_here("bench", WORLD_MODEL, "--trainer.precision", "bf16-mixed", cwd=lab)


def test_training_is_measured_as_it_happens(lab: Path) -> None:
    (lab / "out.json").unlink(missing_ok=True)
    before = sorted(lab.rglob("*"))
    metrics = measure(lab, EXPERIMENT, "--predict", "h100", "cpu")[EXPERIMENT]["metrics"]
    (lab / "out.json").unlink()
    assert sorted(lab.rglob("*")) == before  # no run folder is left
    assert metrics["gflop_per_step"] == pytest.approx(flops_of_training() / 1e9)
    assert metrics["gflop_per_step_of_optimizer"] == 0  # AdamW multiplies no matrices
    assert metrics["samples_per_second"] == pytest.approx(4 * metrics["steps_per_second"])
    share = metrics["gflop_per_step"] * metrics["steps_per_second"] / metrics["matmul_gflop_per_second"]
    assert metrics["mfu"] == pytest.approx(share)
    assert 0 < metrics["data_wait"] < 1
    assert metrics["peak_memory_mib"] > 100
    for name in ("h100", "cpu"):
        low, high = (metrics[f"prediction_{name}_bf16_ms_per_step_{kind}"] for kind in ("fused", "unfused"))
        assert 0 < low < high


def test_a_step_is_the_optimizers_and_its_products_count_apart(lab: Path) -> None:
    options = ("--trainer.accumulate_grad_batches", "2", "--model.optimizer", "owl.optim.MuonAdamW")
    metrics = measure(lab, EXPERIMENT, *options)[EXPERIMENT]["metrics"]
    assert metrics["gflop_per_step"] == pytest.approx(2 * flops_of_training() / 1e9)
    assert metrics["gflop_per_step_of_optimizer"] > 0
    assert metrics["samples_per_second"] == pytest.approx(8 * metrics["steps_per_second"])


def test_networks_are_timed_stage_by_stage(lab: Path) -> None:
    results = measure(lab, AUTOENCODER, WORLD_MODEL, "--decoder", AUTOENCODER, "--denoising_steps", "2")
    autoencoder, world_model = (results[name]["metrics"] for name in (AUTOENCODER, WORLD_MODEL))
    for metrics, stages in ((autoencoder, ("encode", "decode")), (world_model, ("commit", "denoise", "decode"))):
        named = {f"latency_{stage}_{p}" for stage in (*stages, "total") for p in ("p50", "p95")}
        assert {name for name in metrics if name.startswith("latency")} == named
        assert all(metrics[name] > 0 for name in named)
    undecoded = measure(lab, WORLD_MODEL, "--denoising_steps", "1")[WORLD_MODEL]["metrics"]
    assert "latency_decode_p50" not in undecoded
    assert undecoded["gflop_per_frame"] < world_model["gflop_per_frame"]


def test_a_decoder_is_timed_without_its_encoder(lab: Path) -> None:
    decoder = ImageDecoder.of(models.load(lab / AUTOENCODER))  # type: ignore[arg-type]
    models.save(decoder, lab / "exports" / "decoder")
    result = measure(lab, "exports/decoder", "--predict", "rtx5090")["exports/decoder"]
    assert (result["kind"], result["unit"]) == ("decoder", "frame")
    metrics = result["metrics"]
    assert {name for name in metrics if name.endswith("_p50")} == {"latency_decode_p50", "latency_total_p50"}
    assert metrics["frames_per_second"] > 0
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder.decode(torch.zeros(1, *decoder.inputs["latent"]))
    assert metrics["gflop_per_frame"] == pytest.approx(counter.get_total_flops() / 1e9)
    assert any(name.startswith("prediction_rtx5090_") for name in metrics)


def test_sound_is_timed_against_its_duration(lab: Path) -> None:
    network = AudioAutoencoder(strides=[4, 5], widths=[2, 2, 2], latent_channels=2)
    models.save(network, lab / "exports" / "sound")
    models.save(AudioDecoder.of(network), lab / "exports" / "sound_decoder")
    results = measure(lab, "exports/sound", "exports/sound_decoder")
    for name, stages in (("exports/sound", ("encode", "decode")), ("exports/sound_decoder", ("decode",))):
        metrics = results[name]["metrics"]
        assert {key for key in metrics if key.startswith("real_time")} == {f"real_time_{stage}" for stage in stages}
        for stage in stages:
            assert metrics[f"real_time_{stage}"] == pytest.approx(1 / metrics[f"latency_{stage}_p50"], rel=1e-3)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            latent = network.encode(torch.zeros(1, 2, 44_100)).mean if len(stages) == 2 else torch.zeros(1, 2, 2205)
            network.decode(latent)
        assert metrics["gflop_per_second_of_sound"] == pytest.approx(counter.get_total_flops() / 1e9)


def test_a_transformer_is_compiled_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append(module))
    network = DiTDecoder(3, (16, 16), (2, 2), 2, width=32, depth=2, heads=2, steps=2)
    _, _, stages = stages_of(network, "a file", "cpu", torch.float32, compile=True)
    assert compiled == list(network.blocks)
    assert stages["decode"]().shape == (1, 3, 16, 16)


def test_pictures_that_are_encoded_in_training_are_encoded(lab: Path) -> None:
    make_dataset(lab / "played", episodes=4, frames=12, size=(32, 48), modalities=("rgb", "controls"))
    experiment = tiny_world_model(lab / "played")
    experiment["data"]["init_args"] |= {"modalities": ["rgb", "controls"]}
    experiment["trainer"]["callbacks"] = [
        {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
        {"class_path": ENCODER, "init_args": {"path": "${checkpoint.monitor}"}},  # a reference, as decoders have
    ]
    experiment["checkpoint"] = {"monitor": AUTOENCODER}
    write_config(lab / "on_the_fly.yaml", experiment)
    assert measure(lab, "on_the_fly.yaml")["on_the_fly.yaml"]["metrics"]["gflop_per_step"] > 0


def test_two_results_are_compared_by_their_ratios(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, speed in (("a.json", 2.0), ("b.json", 5.0)):
        (tmp_path / name).write_text(json.dumps({"results": {name: {"metrics": {"steps_per_second": speed}}}}))
    assert owl_here("bench", "--compare", "a.json", "b.json", cwd=tmp_path) == 0
    printed = capsys.readouterr().out
    assert "a.json against b.json" in " ".join(printed.split())
    assert "2.500" in printed


@pytest.mark.parametrize(
    ("arguments", "code", "tokens"),
    [
        (["nothing.yaml"], "bench.missing", ["nothing.yaml", ".yaml", ".ckpt"]),
        (["data"], "bench.target", ["data", ".yaml", ".ckpt"]),
        ([EXPERIMENT, "--steps", "0"], "arguments.too-small", ["steps is 0", "at least 1"]),
        ([EXPERIMENT, "--warm_up", "0"], "arguments.too-small", ["warm_up is 0", "at least 1"]),
        ([WORLD_MODEL, "--denoising_steps", "0"], "arguments.too-small", ["denoising_steps is 0", "at least 1"]),
        ([EXPERIMENT, "--predict", "h100", "tpu"], "bench.device", ["for tpu", "rtx5090, h100, h200 or cpu"]),
        ([EXPERIMENT, AUTOENCODER, "--trace", "t.json"], "bench.one-trace", ["2 were given", "--trace"]),
        ([EXPERIMENT, "--data.path", "nowhere"], "dataset.missing", ["nowhere"]),
        (["--compare", "a.json"], "bench.compare", ["1 files"]),
        (["--compare", "a.json", EXPERIMENT], "bench.missing", ["a.json", "--out"]),
        (["--compare", EXPERIMENT, EXPERIMENT], "bench.results", [EXPERIMENT, "--out"]),
    ],
)
def test_what_does_not_fit_is_reported_in_one_sentence(
    lab: Path, arguments: list[str], code: str, tokens: list[str]
) -> None:
    with refused(code, *tokens):
        owl_here("bench", *arguments, cwd=lab)


def test_two_optimizers_are_distinguished_by_what_they_optimize(lab: Path) -> None:
    write_config(lab / "players.yaml", tiny_players(lab / "data"))
    metrics = measure(lab, "players.yaml")["players.yaml"]["metrics"]
    assert metrics["gflop_per_step"] > 10 * metrics["gflop_per_step_of_optimizer"] > 0


def test_a_cycle_of_several_cadences_is_measured_whole(lab: Path) -> None:
    """Of two steps of the discriminator, one is the generator's too: a step costs the mean of both kinds."""

    def gflop(every: int) -> tuple[float, float]:
        write_config(lab / "players.yaml", tiny_players(lab / "data", generator_every=every))
        result = measure(lab, "players.yaml", "--predict", "cpu")["players.yaml"]["metrics"]
        return result["gflop_per_step"], result["gflop_per_step_of_optimizer"]

    (both, own), (mean, own_mean), (third, _) = gflop(1), gflop(2), gflop(3)
    assert own_mean == pytest.approx(own / 2)  # Muon is the generator's
    generator = 2 * (both - mean)
    assert 0 < generator < both
    assert third == pytest.approx(both - generator * 2 / 3)
