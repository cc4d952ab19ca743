"""Training on a GPU through the real command line: every recipe, precision and strategy, and what bench says of it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from owl import models
from tests.gpu.conftest import Record
from tests.helpers.shards import AXES, BUTTONS, make_dataset
from tests.helpers.tiny import REPOSITORY, owl, owl_here
from tests.test_experiments import EXPERIMENTS as SHIPPED
from tests.test_experiments import compiled, train_tiny  # noqa: F401  (compiled is a fixture)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

EXPERIMENTS = {
    "image VAE": "quickstart",
    "inverse dynamics": "inverse_dynamics_quickstart",
    "world model": "world_model_quickstart",
}
CONTROLS = [f"--model.init_args.network.init_args.buttons={json.dumps(BUTTONS)}"]
CONTROLS += [f"--model.init_args.network.init_args.axes={json.dumps(AXES)}"]
FOOTAGE, LATENTS = "footage", "latents"
TRAINER = {
    "accelerator": "gpu",
    "devices": "1",
    "max_time": "null",
    "callbacks": "null",
    "enable_progress_bar": "false",
}
FLOAT8 = REPOSITORY / "configs" / "trainer" / "fp8_5090.yaml"
STEPS = 20


def options(recipe: str, steps: int = STEPS, **trainer: Any) -> list[str]:
    """An experiment at its shipped size, on the footage of the tests."""
    data = {"path": LATENTS if recipe == "world model" else FOOTAGE, "validation_windows": "8", "num_workers": "1"}
    given = [f"--data.init_args.{name}={value}" for name, value in data.items()]
    if recipe != "world model":
        given.append("--data.init_args.record=null")
    if recipe != "image VAE":
        given += CONTROLS
    return given + [f"--trainer.{name}={value}" for name, value in (TRAINER | {"max_steps": steps} | trainer).items()]


def experiment(recipe: str) -> Path:
    return REPOSITORY / "experiments" / f"{EXPERIMENTS[recipe]}.yaml"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Footage, and latents of an autoencoder that was trained on it, on the GPU."""
    folder = tmp_path_factory.mktemp("gpu")
    make_dataset(folder / FOOTAGE, episodes=6, frames=60, size=(96, 160), modalities=("rgb", "controls"))
    assert fit(folder, "image VAE", "autoencoder", "--trainer.precision=bf16-mixed")["steps"] == STEPS
    assert owl_here("data", "encode", "runs/autoencoder/checkpoints/last.ckpt", FOOTAGE, LATENTS, cwd=folder) == 0
    return folder


def fit(lab: Path, recipe: str, name: str, *given: str | Path, **trainer: Any) -> dict[str, float]:
    """Train in this process; returns the run's metrics."""
    words = ["--config", experiment(recipe), *given[: 2 * ("--config" in given)]]
    rest = given[2 * ("--config" in given) :]
    assert owl_here("fit", *words, "--name", name, *options(recipe, **trainer), *rest, cwd=lab) == 0
    metrics = json.loads((lab / "runs" / name / "metrics.json").read_text())
    assert all(math.isfinite(value) for value in metrics.values())
    return metrics


MEASURED = {"image VAE": "val/psnr", "inverse dynamics": "train/loss", "world model": "val/loss"}
"""What is compared between precisions."""


@pytest.mark.parametrize("recipe", EXPERIMENTS)
def test_precisions_learn_alike(lab: Path, record: Record, recipe: str) -> None:
    found = {
        name: fit(lab, recipe, f"{EXPERIMENTS[recipe]}-{name}", f"--trainer.precision={name}")[MEASURED[recipe]]
        for name in ("32-true", "bf16-mixed")
    }
    if recipe != "image VAE":  # which has no linear layer
        metrics = fit(lab, recipe, f"{EXPERIMENTS[recipe]}-fp8", "--config", FLOAT8)
        found["float8"] = metrics[MEASURED[recipe]]
    for value in found.values():
        assert abs(value / found["32-true"] - 1) < 0.1, found
    shown = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    record(f"{recipe}, {STEPS} steps: {MEASURED[recipe]}", shown)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_an_experiment_trains_two_steps(path: Path, record: Record, tmp_path: Path) -> None:
    train_tiny(path, tmp_path, "--trainer.accelerator=gpu", "--trainer.precision=bf16-mixed")
    record(f"{path.name}, two steps at a tiny size, bfloat16", "finite")


def test_auto_precision_is_bfloat16(lab: Path, record: Record) -> None:
    fit(lab, "image VAE", "auto", "--trainer.precision=auto", max_steps=2)
    chosen = yaml.safe_load((lab / "runs/auto/config.yaml").read_text())["trainer"]["precision"]
    assert chosen == "bf16-mixed"
    record("precision auto", chosen)


class NoSynchronization(Callback):
    """Fails a step in which the host waits for the GPU, once what is done once is done."""

    FIRST = 8

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the step."""
        if trainer.global_step >= self.FIRST:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look away, since callbacks may log here."""
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("recipe", EXPERIMENTS)
def test_no_step_waits_for_the_gpu(lab: Path, record: Record, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = f"--trainer.callbacks=[{{class_path: {__name__}.NoSynchronization}}]"
    given = ["--trainer.precision=bf16-mixed", "--trainer.gradient_clip_val=null", watch]
    try:
        fit(lab, recipe, f"{EXPERIMENTS[recipe]}-watched", *given, callbacks="null")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    record(f"{recipe}: steps in which the host waits for the GPU", "none")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("recipe", ["image VAE", "world model"])
def test_one_process_over_nccl_learns_what_one_learns_alone(
    lab: Path, record: Record, recipe: str, strategy: str
) -> None:
    """In processes of their own, as users run it."""
    found = {}
    for chosen in ("auto", strategy):
        name = f"{EXPERIMENTS[recipe]}-{chosen}-{strategy}"
        given = options(recipe, 5, strategy=chosen, precision="32-true")
        given += ["--model.init_args.compile=false"] if recipe == "world model" else []
        owl("fit", "--config", experiment(recipe), "--name", name, *given, cwd=lab)
        found[chosen] = models.load(lab / "runs" / name / "checkpoints" / "last.ckpt").state_dict()
    alone, together = found["auto"], found[strategy]
    assert alone.keys() == together.keys()
    change = torch.cat([alone[name].flatten().double() for name in alone])
    error = torch.cat([(alone[name].double() - together[name].double()).flatten() for name in alone])
    assert error.norm() / change.norm() < 1e-3
    record(f"{recipe}, {strategy}, one process over NCCL, 5 steps", f"error {error.norm() / change.norm():.1e}")


@pytest.mark.parametrize("recipe", EXPERIMENTS)
def test_bench_with_its_roofline(lab: Path, record: Record, recipe: str) -> None:
    sheet = "h200" if "H200" in torch.cuda.get_device_name() else "h100"
    out = lab / f"{EXPERIMENTS[recipe]}.json"
    given = [word for word in options(recipe) if "max_steps" not in word and "callbacks" not in word]
    command = ["bench", experiment(recipe), "--steps", "20", "--predict", sheet, "--out", out]
    owl(*command, *given, "--trainer.precision=bf16-mixed", cwd=lab)
    (result,) = json.loads(out.read_text())["results"].values()
    metrics = result["metrics"]
    low, high = (metrics[f"prediction_{sheet}_bf16_ms_per_step_{way}"] for way in ("fused", "unfused"))
    assert metrics["steps_per_second"] > 0
    record(
        f"{recipe}: a training step as shipped, bfloat16",
        f"{1e3 / metrics['steps_per_second']:.1f} ms (roofline of {sheet}: {low:.2f} to {high:.2f} ms), "
        f"MFU {metrics['mfu']:.2f}, peak memory {metrics['peak_memory_mib'] / 1024:.2f} GiB",
    )


def test_a_world_model_is_rolled_out(lab: Path, record: Record) -> None:
    fit(lab, "world model", "rolled", "--trainer.precision=bf16-mixed")
    checkpoint = "runs/rolled/checkpoints/last.ckpt"
    owl(
        "rollout",
        checkpoint,
        "--data",
        LATENTS,
        "--frames",
        "100",
        "--clips",
        "4",
        "--horizon",
        "8",
        "--starts",
        "0",
        cwd=lab,
    )
    metrics = json.loads((lab / "runs/rolled/rollout/metrics.json").read_text())
    record(
        "Rollout of the quickstart's world model with decoding, eager", f"{metrics['frames_per_second']:.0f} frames/s"
    )
