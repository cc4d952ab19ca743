"""Every recipe does on two processes what it does on one, whatever spreads it; checkpoints move between them."""

import faulthandler
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from owl import models
from owl.data.shards import DatasetInfo
from owl.errors import OwlError
from owl.latents import load_latent_stats
from owl.models.image_autoencoder import ImageAutoencoder
from tests.helpers.autoencoders import tiny_decoder, tiny_gan_decoder
from tests.helpers.errors import refused
from tests.helpers.latents import dot_experiment, lively, make_latents, tiny_consistency, tiny_self_forcing
from tests.helpers.players import tiny_players
from tests.helpers.ranks import RANKS, start
from tests.helpers.shards import make_dataset
from tests.helpers.taught import tiny_taught
from tests.helpers.tiny import owl_here, tiny_experiment, tiny_inverse_dynamics, write_config

FIRST, LAST = 3, 5
"""Steps after which runs are compared, and continued in another way."""
STRATEGIES = ("ddp", "fsdp2")
TRAINED = [f"{layer}.{name}" for layer in (0, 3) for name in ("weight", "bias")]
"""Of the network with frozen parts."""
ENCODER = {"class_path": "owl.callbacks.frozen_encoder.FrozenEncoder"}
PATCHES = {"class_path": "owl.models.discriminators.PatchDiscriminator", "init_args": {"width": 8, "layers": 2}}
PRECISIONS = {"bf16": ("--trainer.precision", "bf16-mixed"), "fp8": ("--config", "fp8.yaml")}
UNVALIDATED = ("--trainer.limit_val_batches", "0")


def image_vae(folder: Path) -> dict[str, Any]:
    experiment = tiny_experiment(folder / "footage")
    experiment["model"]["init_args"] |= {"sample": False}  # each process draws samples of its own
    return experiment


def world_model(folder: Path) -> dict[str, Any]:
    experiment = dot_experiment(folder / "latents")
    experiment["data"]["init_args"]["length"] = 8  # float8 wants multiples of 16 frames in a batch
    return experiment


def encoded_on_the_fly(folder: Path) -> dict[str, Any]:
    """A world model of pictures, which an encoder beside the recipe encodes."""
    experiment = dot_experiment(
        folder / "footage", callbacks=[ENCODER | {"init_args": {"path": str(folder / "encoder")}}]
    )
    experiment["data"]["init_args"] |= {"modalities": ["rgb", "controls"], "length": 8}
    return experiment


def packed_clips(folder: Path) -> dict[str, Any]:
    """Short episodes, of which the processes hold unequal numbers of frames; controls that are always known."""
    experiment = dot_experiment(folder / "clips")
    experiment["data"]["init_args"] |= {"length": 8, "pack": True}
    experiment["model"]["init_args"]["control_dropout"] = 0.0
    return experiment


def inverse_dynamics(folder: Path) -> dict[str, Any]:
    experiment = tiny_inverse_dynamics(folder / "footage")
    experiment["model"]["init_args"]["augmentation"] = {"blur": 0.0, "brightness": 0.0, "noise": 0.0}
    return experiment


def two_optimizers(folder: Path) -> dict[str, Any]:
    return tiny_players(folder / "footage")


def frozen_parts(folder: Path) -> dict[str, Any]:
    return tiny_taught(folder / "footage")


def cadence(folder: Path) -> dict[str, Any]:
    """The first checkpoint is within a cycle, and of an optimiser that was never stepped."""
    assert FIRST < 4 < LAST < 8
    return tiny_players(folder / "footage", generator_every=4)


def gradient_penalty(folder: Path) -> dict[str, Any]:
    return tiny_players(folder / "footage", penalty=0.1)


def gan_decoder(folder: Path) -> dict[str, Any]:
    """Without penalties, for which FSDP2 does not keep the weights."""
    return tiny_gan_decoder(folder / "footage", folder / "encoder", gamma=0.0)


def distill(folder: Path) -> dict[str, Any]:
    """With a discriminator; without penalties, for which FSDP2 does not keep the weights."""
    student = {"class_path": "owl.models.image_decoder.ImageDecoder"}
    student["init_args"] = {"widths": [8, 8], "blocks": [1, 1], "patch": 4}
    options = {"network": student, "discriminator": PATCHES, "gamma": 0.0, "weights": {"lpips": 0.0}}
    return tiny_decoder(folder / "footage", folder / "encoder", "owl.recipes.distill.Distill", **options)


def distill_encoder(folder: Path) -> dict[str, Any]:
    experiment = tiny_experiment(folder / "footage")
    student = {"class_path": "owl.models.image_encoder.ImageEncoder"}
    student["init_args"] = {"widths": [8, 8], "blocks": [1, 1], "patch": 4}
    arguments = {"autoencoder": str(folder / "encoder"), "network": student}
    experiment["model"] = {"class_path": "owl.recipes.distill_encoder.DistillEncoder", "init_args": arguments}
    return experiment


def diffusion_decoder(folder: Path) -> dict[str, Any]:
    """Some frames learn shortcuts, unequally many in the processes; a frozen decoder is a part of the network."""
    network = {"patch": [8, 8], "width": 32, "depth": 2, "heads": 2, "latent_tokens": "separate", "shortcut": True}
    options = {"network": {"class_path": "owl.models.diffusion_decoder.DiTDecoder", "init_args": network}}
    options |= {"residual": True, "weights": {"lpips": 0.0}, "bootstrap": 0.4, "latent_dropout": 0.2, "length": 4}
    return tiny_decoder(
        folder / "footage", folder / "encoder", "owl.recipes.diffusion_decoder.DiffusionDecoder", **options
    )


def frame_pairs(folder: Path) -> dict[str, Any]:
    """The adversarial decoder on neighbouring frames, each decoded with the help of the one before."""
    weights = {"lpips": 0.0, "adversarial": 0.1, "temporal": 1.0}
    clips = {"modalities": ("rgb", "flow"), "length": 2, "frames": 2}
    return tiny_gan_decoder(folder / "footage", folder / "encoder", gamma=0.0, previous=True, weights=weights, **clips)


def diffusion_autoencoder(folder: Path) -> dict[str, Any]:
    """With a discriminator; without penalties, for which FSDP2 does not keep the weights."""
    network = {"class_path": "owl.models.diffusion_decoder.DiTDecoder"}
    network["init_args"] = {"width": 32, "depth": 2, "heads": 2}
    options = {"network": network, "train_encoder": True, "noise_sync": 0.5, "length": 4, "gamma": 0.0}
    options |= {"discriminator": PATCHES, "adversarial_ramp": 2, "weights": {"lpips": 0.0, "adversarial": 0.5}}
    experiment = tiny_decoder(
        folder / "footage", folder / "encoder", "owl.recipes.diffusion_decoder.DiffusionDecoder", **options
    )
    del experiment["trainer"]["callbacks"]
    return experiment


def self_forcing(folder: Path) -> dict[str, Any]:
    """The first checkpoint is within a cycle of the critic."""
    experiment = tiny_self_forcing(folder / "latents", folder / "world_model")
    experiment["model"]["init_args"] |= {"two_passes": True}
    return experiment


def causal_consistency(folder: Path) -> dict[str, Any]:
    experiment = tiny_consistency(folder / "latents", folder / "world_model")
    experiment["data"]["init_args"]["length"] = 8  # float8 wants multiples of 16 frames in a batch
    return experiment


RECIPES = (
    image_vae,
    world_model,
    encoded_on_the_fly,
    packed_clips,
    inverse_dynamics,
    two_optimizers,
    cadence,
    gradient_penalty,
    frozen_parts,
    gan_decoder,
    distill,
    distill_encoder,
    diffusion_decoder,
    frame_pairs,
    diffusion_autoencoder,
    self_forcing,
    causal_consistency,
)
"""Experiments, one for each recipe, whose only randomness is that of a sample. A new recipe joins by a line."""
NAMES = [recipe.__name__ for recipe in RECIPES]
IMPOSSIBLE = {("gradient_penalty", "fsdp2")}
"""FSDP2 frees weights after each backward; a second one through the first needs them."""


CONVOLUTIONS = {
    "image_vae",
    "two_optimizers",
    "cadence",
    "gradient_penalty",
    "frozen_parts",
    "gan_decoder",
    "distill",
    "distill_encoder",
    "frame_pairs",
}
"""Those without a linear layer, in which float8 has nothing to do."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strategies")
    make_dataset(folder / "footage", episodes=6, frames=12, size=(32, 48), modalities=("rgb", "controls", "flow"))
    torch.manual_seed(0)
    models.save(ImageAutoencoder(3, (32, 48), (4, 6), 2, [8, 16, 16], [1, 1, 1]), folder / "encoder")
    make_latents(folder / "latents", lengths=(25,) * 6)
    network = lively()
    load_latent_stats(network, DatasetInfo.load(folder / "latents").modalities, "latents")
    models.save(network, folder / "world_model")
    make_latents(folder / "clips", lengths=(3, 8, 5, 7, 8, 6, 8, 5, 7, 8, 6, 5, 8, 7, 6, 8, 25, 25))
    for recipe in RECIPES:
        experiment = recipe(folder)
        experiment["model"]["init_args"]["final_lr"] = 1.0  # a run may be made longer without another schedule
        experiment["data"]["init_args"]["validation_windows"] = 3
        write_config(folder / f"{recipe.__name__}.yaml", experiment)
    plugin = {"class_path": "owl.precision.fp8.Float8Precision", "init_args": {"emulate": True}}
    write_config(folder / "fp8.yaml", {"trainer": {"plugins": [plugin]}})
    return folder


def fit(lab: Path, recipe: str, name: str, steps: int, *options: str) -> int:
    arguments = ("--config", f"{recipe}.yaml", "--name", name, "--trainer.max_steps", str(steps), *options)
    return owl_here("fit", *arguments, cwd=lab)


def one(lab: Path, recipe: str, name: str, steps: int, *options: str) -> None:
    assert fit(lab, recipe, name, steps, "--data.init_args.batch_size", "8", *options) == 0


def spread(strategy: str, *options: str) -> tuple[str, ...]:
    """The options of two processes of batch 4."""
    devices = ("--trainer.devices", "2", "--trainer.strategy", strategy, "--data.init_args.batch_size", "4")
    return (*devices, *options)


def watch() -> None:
    """Say where a process hangs, and end it."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(100, exit=True)


def rank(environment: dict[str, str], *arguments: Any) -> None:
    """One process of a run, which ends with the run's exit status."""
    watch()
    os.environ.update(environment)
    sys.exit(fit(*arguments))


def note_refusal(environment: dict[str, str], lab: Path, *arguments: Any) -> None:
    """One process of a run that must be refused, which notes the error's code."""
    try:
        rank(environment, lab, *arguments)
    except OwlError as error:
        (lab / f"refused-{environment['RANK']}").write_text(error.code)


def two_new(
    lab: Path,
    recipe: str,
    name: str,
    steps: int,
    strategy: str,
    *options: str,
    status: int = 0,
    target: Callable[..., None] = rank,
) -> None:
    """A run of two processes, which end with it; the first one with a status."""
    processes = start(target, lambda number: (lab, recipe, name, steps, *spread(strategy, *options)))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [status, 0]


def rank_of_many(environment: dict[str, str], runs: Connection) -> None:
    """One process of many runs, one after another: most of a short run's time is that of a new process."""
    os.environ.update(environment)
    gc.freeze()  # as the test process does
    while (arguments := runs.recv()) is not None:
        watch()
        runs.send(fit(*arguments))
        faulthandler.cancel_dump_traceback_later()


class Two:
    """Runs of two processes, which last until one fails."""

    def __init__(self, lab: Path) -> None:
        self.lab = lab
        self.runs: tuple[Any, ...] = ()
        self.processes: list[Any] = []

    def __call__(self, recipe: str, name: str, steps: int, strategy: str, *options: str) -> None:
        """Train, as `two_new` does."""
        if not all(process.is_alive() for process in self.processes) or not self.processes:
            self.runs, theirs = zip(*(RANKS.Pipe() for _ in range(2)), strict=True)
            self.processes = start(rank_of_many, lambda number: (theirs[number],))
            for end in theirs:
                end.close()  # so that the end of a process is seen
        for runs in self.runs:
            runs.send((self.lab, recipe, name, steps, *spread(strategy, *options)))
        assert [runs.recv() for runs in self.runs] == [0, 0]

    def end(self) -> None:
        """End the processes."""
        for runs, process in zip(self.runs, self.processes, strict=True):
            runs.send(None)
            process.join()


@pytest.fixture(scope="module")
def two(lab: Path) -> Iterator[Two]:
    two = Two(lab)
    yield two
    two.end()


def content(lab: Path, name: str) -> dict[str, Any]:
    return torch.load(lab / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The averaged weights with the latents' statistics, the raw ones, and the optimiser's state."""
    assert found["global_step"] == expected["global_step"]
    assert found["ema"]["updates"] == expected["ema"]["updates"]
    for a, b in ((found["state_dict"], expected["state_dict"]), (found["ema"]["raw"], expected["ema"]["raw"])):
        assert a.keys() == b.keys()
        for name in b:
            torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def possible(recipe: str) -> list[str]:
    return [strategy for strategy in STRATEGIES if (recipe, strategy) not in IMPOSSIBLE]


def weights(lab: Path, name: str) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in content(lab, name)["ema"]["raw"].values()])


def reference(lab: Path, recipe: str, steps: int) -> str:
    """Name a run of one process from its beginning, which is trained once."""
    name = f"{recipe}-{steps}"
    if not (lab / "runs" / name).exists():
        one(lab, recipe, name, steps)
    return name


@pytest.mark.parametrize("recipe", NAMES)
def test_two_processes_equal_one_and_continue_as_one(lab: Path, two: Two, recipe: str) -> None:
    first, last = reference(lab, recipe, FIRST), reference(lab, recipe, LAST)
    untouched = (lab / "runs" / first / "checkpoints" / "last.ckpt").read_bytes()
    for strategy in possible(recipe):
        name = f"{recipe}-{strategy}"
        two(recipe, name, FIRST, strategy)
        same(content(lab, name), content(lab, first))
        one(lab, recipe, name, LAST, "--ckpt_path", "last")
        same(content(lab, name), content(lab, last))
        two(recipe, first, LAST, strategy, "--ckpt_path", "last")
        same(content(lab, first), content(lab, last))
        (lab / "runs" / first / "checkpoints" / "last.ckpt").write_bytes(untouched)


def test_each_process_holds_half_of_a_frozen_part_and_no_checkpoint_any(lab: Path) -> None:
    two_new(lab, "frozen_parts", "halves", 1, "fsdp2", "--trainer.callbacks", "tests.helpers.taught.Shares")
    for number in range(2):
        shares = json.loads((lab / f"shares-{number}.json").read_text())
        assert {name.split(".")[0] for name in shares} == {"network", "teacher"}
        assert all(2 * here == everywhere for here, everywhere in shares.values())
    stored = content(lab, "halves")
    assert {*stored["state_dict"]} == {*stored["ema"]["raw"]} == {f"network.{n}" for n in TRAINED}
    assert len(stored["optimizer_states"][0]["state"]) == len(TRAINED)


def test_a_checkpoint_that_lacks_what_is_trained_is_refused(lab: Path) -> None:
    one(lab, "frozen_parts", "lacking", 1)
    stored = content(lab, "lacking")
    del stored["state_dict"]["network.3.bias"]
    torch.save(stored, lab / "lacking.ckpt")
    two_new(lab, "frozen_parts", "refused", 2, "fsdp2", "--ckpt_path", "lacking.ckpt", target=note_refusal)
    assert [(lab / f"refused-{number}").read_text() for number in range(2)] == ["checkpoint.other-network"] * 2


def test_a_signal_to_one_process_stops_all_at_the_same_step(lab: Path, two: Two) -> None:
    """One that got none has started another step by then, after which both stop."""
    send = ["--trainer.callbacks+=tests.helpers.faults.SendSignal", "--trainer.callbacks.rank=1"]
    for key, value in {"signal": "SIGUSR1", "hook": "on_train_batch_start", "call": FIRST - 1}.items():
        send += [f"--trainer.callbacks.{key}={value}"]
    two_new(lab, "world_model", "stopped", LAST, "ddp", *send, status=138)
    assert content(lab, "stopped")["global_step"] == FIRST
    two("world_model", "stopped", LAST, "ddp", "--ckpt_path", "last")
    same(content(lab, "stopped"), content(lab, reference(lab, "world_model", LAST)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("recipe", NAMES)
def test_two_processes_train_in_every_precision(lab: Path, two: Two, recipe: str, precision: str) -> None:
    name = f"{recipe}-{precision}"
    if precision == "fp8" and recipe in CONVOLUTIONS:
        with refused("fp8.layers", "trained linear layers", "trainer.precision"):
            one(lab, recipe, name, FIRST, *PRECISIONS[precision])
        return
    if precision == "fp8" and recipe == "self_forcing":  # a rollout has the tokens of one frame
        with refused("fp8.multiple", "batch size"):
            one(lab, recipe, name, FIRST, *PRECISIONS[precision])
        return
    exact = weights(lab, reference(lab, recipe, FIRST))
    moved = (weights(lab, reference(lab, recipe, LAST)) - exact).norm()
    for strategy in possible(recipe):
        two(recipe, f"{name}-{strategy}", FIRST, strategy, *PRECISIONS[precision], *UNVALIDATED)
        rounding = (weights(lab, f"{name}-{strategy}") - exact).norm()
        assert 0 < rounding < moved, f"{strategy}: off by {rounding}, float32 moves by {moved} in two steps"


def test_devices_that_would_choose_different_dtypes_do_not_train_together(lab: Path) -> None:
    unequal = ("--trainer.callbacks", "tests.helpers.arithmetic.UnequalRanks")
    two_new(lab, "image_vae", "unequal", 1, "ddp", *unequal, target=note_refusal)
    assert [(lab / f"refused-{number}").read_text() for number in range(2)] == ["trainer.devices"] * 2
    assert not (lab / "runs" / "unequal" / "checkpoints").exists()


def test_processes_follow_one_plan_where_time_ends_training(lab: Path, two: Two) -> None:
    """By the clock of the first, while that of the other stands still; and the run that has ended stays so."""
    clock = ("--trainer.callbacks+=tests.helpers.faults.Stopwatch", "--trainer.callbacks.seconds=[1.0]")
    limited = ("--trainer.max_time", "00:00:00:12", "--model.init_args.final_lr", "0.1", *clock)
    two("image_vae", "timed", 100, "fsdp2", *limited)
    ended = content(lab, "timed")
    assert 6 <= ended["global_step"] <= 12
    assert ended["global_step"] == ended["budget"]["changes"][-1][1]
    assert ended["lr_schedulers"][0]["_last_lr"] == [pytest.approx(0.1 * 3e-4)]
    two("image_vae", "timed", 100, "fsdp2", *limited, "--ckpt_path", "last")
    assert content(lab, "timed")["global_step"] == ended["global_step"]
