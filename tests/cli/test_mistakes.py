"""One line for every mistake in files and options, with the place, the code and the nearest name."""

import sys
from pathlib import Path
from typing import Any

import pytest

from owl.__main__ import main
from owl.recipes.image_vae import ImageVAE
from tests.cli.conftest import ErrorLine
from tests.helpers.errors import check_line, refused
from tests.helpers.tiny import owl_here, tiny_experiment, write_config


class OtherVAE(ImageVAE):
    """A recipe with the arguments of another, of which it needs the network."""


def at(path: str, value: Any) -> dict[str, Any]:
    """A configuration with one value."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


EARLY_STOPPING = "lightning.pytorch.callbacks.EarlyStopping"
NETWORK = "model.init_args.network"
# What is written into wrong.yaml, the error's code, and what the line must name.
MISTAKES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "key at the top": (
        at("trianer.max_steps", 3),
        "arguments.unknown-key",
        ["wrong.yaml: key 'trianer'", "'trainer'"],
    ),
    "key of the trainer": (
        at("trainer.max_step", 3),
        "arguments.unknown-key",
        ["wrong.yaml: key 'trainer.max_step'", "'max_steps'"],
    ),
    "key of the recipe": (
        at("model.init_args.warmup_step", 3),
        "arguments.unknown-key",
        ["wrong.yaml: key 'model.init_args.warmup_step'", "owl.recipes.image_vae.ImageVAE", "'warmup_steps'"],
    ),
    "key of the weights": (
        at("model.init_args.weights.logit_laplac", 3),
        "arguments.unknown-key",
        ["wrong.yaml: key 'model.init_args.weights.logit_laplac'", "'logit_laplace'"],
    ),
    "key of the network": (
        at(f"{NETWORK}.init_args.latent_chanels", 3),
        "arguments.unknown-key",
        [f"wrong.yaml: key '{NETWORK}.init_args.latent_chanels'", "'latent_channels'"],
    ),
    "key of the data": (
        at("data.init_args.batchsize", 3),
        "arguments.unknown-key",
        ["wrong.yaml: key 'data.init_args.batchsize'", "'batch_size'"],
    ),
    "key of the average": (
        at("ema.decai", 0.5),
        "arguments.unknown-key",
        ["wrong.yaml: key 'ema.decai'", "'decay'"],
    ),
    "type of the trainer": (
        at("trainer.max_steps", "many"),
        "arguments.wrong-value",
        ["wrong.yaml: key 'trainer.max_steps'", "'many'", "int"],
    ),
    "type of the network": (
        at(f"{NETWORK}.init_args.latent_channels", "four"),
        "arguments.wrong-value",
        [f"wrong.yaml: key '{NETWORK}.init_args.latent_channels'", "'four'", "int"],
    ),
    "type of the recipe": (
        at("model.init_args.sample", "perhaps"),
        "arguments.wrong-value",
        ["wrong.yaml: key 'model.init_args.sample'", "'perhaps'", "bool"],
    ),
    "key of a callback": (
        at("trainer.callbacks", [{"class_path": EARLY_STOPPING, "init_args": {"monitor": "val/psnr", "patince": 3}}]),
        "arguments.unknown-key",
        ["wrong.yaml: key 'trainer.callbacks.0.init_args.patince'", EARLY_STOPPING, "'patience'"],
    ),
    "key of the optimizer": (
        at("model.init_args.optimizer", {"class_path": "owl.optim.MuonAdamW", "init_args": {"learning_rate": 0.1}}),
        "arguments.unknown-key",
        ["wrong.yaml: key 'model.init_args.optimizer.init_args.learning_rate'", "owl.optim.MuonAdamW", "muon_ratio"],
    ),
    "class of the optimizer": (
        at("model.init_args.optimizer", {"class_path": "torch.optim.AdamV"}),
        "arguments.unknown-class",
        ["wrong.yaml: key 'model.init_args.optimizer.class_path'", "'torch.optim.AdamV'", "'torch.optim.Adam"],
    ),
    "a choice": (
        at("checkpoint.mode", "maximum"),
        "arguments.wrong-value",
        ["wrong.yaml: key 'checkpoint.mode'", "'maximum'", "min, max", "'max'"],
    ),
    "a value out of range": (at("ema.decay", 1.5), "ema.decay", ["ema.decay", "1.5", "[0, 1)"]),
    "class that is not there": (
        at(f"{NETWORK}.class_path", "owl.models.image_autoencoder.ImageAutoencodr"),
        "arguments.unknown-class",
        [f"wrong.yaml: key '{NETWORK}.class_path'", "'owl.models.image_autoencoder.ImageAutoencoder'"],
    ),
    "class of another kind": (
        at("model.class_path", "owl.models.image_autoencoder.ImageAutoencoder"),
        "arguments.unknown-class",
        ["wrong.yaml: key 'model.class_path'", "owl.models.image_autoencoder.ImageAutoencoder", "LightningModule"],
    ),
    "module that is not there": (
        at("model.class_path", "owl.recipe.image_vae.ImageVAE"),
        "arguments.unknown-class",
        ["wrong.yaml: key 'model.class_path'", "owl.recipe.image_vae.ImageVAE"],
    ),
    "network that cannot be": (
        at(f"{NETWORK}.init_args.latent_channels", 3),
        "network.arguments",
        ["latent_channels", "3", "16"],
    ),
    "reference to nothing": (
        at("trainer.max_steps", "${data.init_args.batch_sise}"),
        "arguments.unknown-reference",
        ["wrong.yaml: key 'trainer.max_steps'", "${data.init_args.batch_sise}", "'data.init_args.batch_size'"],
    ),
    "variable that is not set": (
        at("trainer.max_steps", "${oc.env:OWL_NOT_SET}"),
        "arguments.unset-variable",
        ["wrong.yaml: key 'trainer.max_steps'", "OWL_NOT_SET", "${oc.env:OWL_NOT_SET,VALUE}"],
    ),
    "reference that is none": (at("runs", "${oc.envv:HOME}"), "arguments.bad-reference", ["wrong.yaml: key 'runs'"]),
    "references in a circle": (
        {"runs": "${name}", "name": "${runs}"},
        "arguments.bad-reference",
        ["wrong.yaml: key 'name'"],
    ),
    "what no run can do without": (
        at("trainer.enable_checkpointing", False),
        "trainer.refused",
        ["trainer.enable_checkpointing"],
    ),
    "a trainer of Lightning alone": (at("trainer.barebones", True), "trainer.refused", ["barebones", "owl bench"]),
    "an accelerator that is not there": (at("trainer.accelerator", "gpuu"), "trainer.refused", ["gpuu"]),
    "a value of several types": (
        at("trainer.precision", "fp16"),
        "arguments.wrong-value",
        ["wrong.yaml: key 'trainer.precision'", "'fp16'", "bf16-true, bf16-mixed, 32-true", "'bf16'"],
    ),
    "a number in the place of a section": (
        at("trainer", 3),
        "arguments.no-mapping",
        ["wrong.yaml: key 'trainer'", "'3'"],
    ),
    "a number in the place of the weights": (
        at("model.init_args.weights", 3),
        "arguments.no-mapping",
        ["wrong.yaml: key 'model.init_args.weights'", "'3'"],
    ),
    "nothing in the place of the weights": (
        at("model.init_args.weights", None),
        "arguments.no-mapping",
        ["wrong.yaml: key 'model.init_args.weights'"],
    ),
    "no recipe": (at("model", 3), "arguments.no-mapping", ["wrong.yaml: key 'model'", "'3'"]),
    "weights in bfloat16": (at("trainer.precision", "bf16-true"), "trainer.precision", ["bf16-true", "bf16-mixed"]),
    "a number in the place of arguments": (
        at("model.init_args", 3),
        "arguments.no-mapping",
        ["wrong.yaml: key 'model.init_args'", "'3'"],
    ),
    "a word in the place of a section": (
        at("trainer", "foo"),
        "arguments.missing-file",
        ["wrong.yaml: key 'trainer'", "'foo'"],
    ),
    "a word in the place of the recipe": (at("model", "foo"), "arguments.unknown-class", ["wrong.yaml: key 'model'"]),
    "type within a list": (
        at("data.init_args.size", ["tall", 48]),
        "arguments.wrong-value",
        ["wrong.yaml: key 'data.init_args.size'", "tall", "tuple[int, int]"],
    ),
    "key of the default optimizer": (
        at("model.init_args.optimizer.init_args.lrr", 0.1),
        "arguments.unknown-key",
        ["wrong.yaml: key 'model.init_args.optimizer.init_args.lrr'", "torch.optim.AdamW", "'lr'"],
    ),
    "type of the default optimizer": (  # which may be a number or an object
        at("model.init_args.optimizer.init_args.lr", "fast"),
        "arguments.wrong-value",
        ["wrong.yaml: key 'model.init_args.optimizer.init_args.lr'", "'fast'", "float"],
    ),
    "key of a callback by its name alone": (
        at("trainer.callbacks", [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/psnr", "patince": 3}}]),
        "arguments.unknown-key",
        ["wrong.yaml: key 'trainer.callbacks.0.init_args.patince'", "'patience'"],
    ),
    "an argument that a callback needs": (
        at("trainer.callbacks", [{"class_path": EARLY_STOPPING}]),
        "arguments.missing-key",
        ["wrong.yaml: key 'trainer.callbacks.0.init_args'", EARLY_STOPPING, "monitor"],
    ),
    "another recipe": (  # whose network is not the first one's
        at("model", {"class_path": "owl.recipes.inverse_dynamics.InverseDynamics", "init_args": {"final_lr": 0.1}}),
        "arguments.missing-key",
        ["wrong.yaml: key 'model.init_args'", "owl.recipes.inverse_dynamics.InverseDynamics", "network"],
    ),
    "another recipe, with a wrong key elsewhere": (  # it keeps the first one's network
        {"model": {"class_path": "tests.cli.test_mistakes.OtherVAE"}, "trainer": {"max_step": 3}},
        "arguments.unknown-key",
        ["wrong.yaml: key 'trainer.max_step'", "'max_steps'"],
    ),
    "a section in a file of its own": (
        at("trainer", "trainer.yaml"),
        "arguments.unknown-key",
        ["trainer.yaml: key 'max_step'", "'max_steps'"],
    ),
    "a network in a file of its own": (
        at(NETWORK, "network.yaml"),
        "arguments.unknown-key",
        ["network.yaml: key 'init_args.widhts'", "'widths'"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_configuration_is_reported_in_one_line(lab: Path, error_line: ErrorLine, mistake: str) -> None:
    content, code, named = MISTAKES[mistake]
    network = {"class_path": "owl.models.image_autoencoder.ImageAutoencoder", "init_args": {"widhts": [8, 16, 16]}}
    write_config(lab / "network.yaml", network)
    write_config(lab / "trainer.yaml", {"max_step": 3})
    write_config(lab / "wrong.yaml", content)
    line = error_line("--config", "base.yaml", "--config", "wrong.yaml")
    check_line(line, code, *named)


# What is written on the command line, the error's code, and what the line must name.
MISTAKEN_OPTIONS = {
    ("--trainer.max_step", "3"): ("arguments.unknown-key", ["--trainer.max_step", "'--trainer.max_steps'"]),
    ("--overwrit", "true"): ("arguments.unknown-key", ["--overwrit", "'--overwrite'"]),
    ("--trainer.max_steps", "many"): ("arguments.wrong-value", ["--trainer.max_steps", "'many'"]),
    ("--model.warmup_step", "3"): (
        "arguments.unknown-key",
        ["--model.warmup_step", "owl.recipes.image_vae.ImageVAE", "'warmup_steps'"],
    ),
    ("--model.weights.lpip", "3"): ("arguments.unknown-key", ["--model.weights.lpip", "'lpips'"]),
    ("--model.network.latent_chanels", "3"): (
        "arguments.unknown-key",
        ["--model.network.latent_chanels", "'latent_channels'"],
    ),
    ("--model.init_args.weights", "3"): ("arguments.no-mapping", ["--model.init_args.weights", "'3'"]),
    ("--trainer.max_steps",): ("arguments.missing-value", ["--trainer.max_steps"]),
    ("--trainer.max_steps=${nmae}",): ("arguments.unknown-reference", ["--trainer.max_steps", "${nmae}", "'name'"]),
    ("--data.size", "[tall, 48]"): ("arguments.wrong-value", ["--data.size", "tall"]),
    ("--model.optimizer", "Adam", "--model.optimizer.lrr", "3"): ("arguments.unknown-key", ["optimizer.lrr", "'lr'"]),
    ("--trainer.callbacks+", EARLY_STOPPING, "--trainer.callbacks.monitor", "x", "--trainer.callbacks.patience", "z"): (
        "arguments.wrong-value",
        ["--trainer.callbacks.patience", "'z'", "int"],
    ),
    ("--model.network=network.yaml", "--model.network.widhts", "3"): (
        "arguments.unknown-key",
        ["--model.network.widhts", "'widths'"],
    ),
    ("--print_confg",): ("arguments.unknown-key", ["--print_confg", "'--print_config'"]),
    ("more",): ("arguments.no-option", ["'more'", "--help"]),
    ("more.yaml",): ("arguments.no-option", ["'more.yaml'", "--config"]),
}


@pytest.mark.parametrize("words", MISTAKEN_OPTIONS)
def test_a_wrong_option_names_the_nearest_one(lab: Path, error_line: ErrorLine, words: tuple[str, ...]) -> None:
    code, named = MISTAKEN_OPTIONS[words]
    write_config(lab / "network.yaml", tiny_experiment(Path("data"))["model"]["init_args"]["network"])
    line = error_line("--config", "base.yaml", *words)
    check_line(line, code, *named)


def test_the_streams_of_a_world_model_are_reported_one_by_one(lab: Path, error_line: ErrorLine) -> None:
    """A dict of dataclass objects: what is wrong is in one of them, or there is no dict at all."""
    experiment = tiny_experiment(Path("data"))
    network = {"class_path": "owl.models.world_model.WorldTransformer", "init_args": {"buttons": [], "axes": []}}
    experiment["model"] = {"class_path": "owl.recipes.world_model.WorldModel", "init_args": {"network": network}}
    write_config(lab / "base.yaml", experiment)
    video = {"shape": [4, 4, 6]}
    for streams, code, named in (
        (3, "arguments.wrong-value", ["streams'", "'3'", "Stream"]),
        ({"video": video, "depth": 3}, "arguments.wrong-value", ["streams.depth'", "'3'", "Stream"]),
        ({"video": video, "depth": {"shap": [1]}}, "arguments.unknown-key", ["streams.depth.shap'", "'shape'"]),
        ({"video": {**video, "patch": "x"}}, "arguments.wrong-value", ["streams.video.patch'", "'x'", "int"]),
    ):
        write_config(lab / "wrong.yaml", at(f"{NETWORK}.init_args.streams", streams))
        check_line(error_line("--config", "base.yaml", "--config", "wrong.yaml"), code, "wrong.yaml: key", *named)


def test_a_file_that_is_missing_or_broken_is_named(lab: Path, error_line: ErrorLine) -> None:
    line = error_line("--config", "nothing.yaml")
    check_line(line, "arguments.missing-file", repr(str(lab / "nothing.yaml")))
    (lab / "broken.yaml").write_text("trainer:\n  max_steps: [1, 2\nmodel: {")
    line = error_line("--config", "base.yaml", "--config", "broken.yaml")
    check_line(line, "arguments.not-yaml", "broken.yaml", "line 3")
    write_config(lab / "absent.yaml", at(NETWORK, "networks/none.yaml"))
    line = error_line("--config", "base.yaml", "--config", "absent.yaml")
    check_line(line, "arguments.missing-file", f"absent.yaml: key '{NETWORK}'", "'networks/none.yaml'")
    write_config(lab / "absent.yaml", at(NETWORK, "broken.yaml"))
    line = error_line("--config", "base.yaml", "--config", "absent.yaml")
    check_line(line, "arguments.not-yaml", "broken.yaml", "line 3")


def test_files_in_the_wrong_place_are_reported(lab: Path, error_line: ErrorLine) -> None:
    with refused("arguments.unknown-key", "base.yaml: key 'seed_everything'"):
        owl_here("export", "--config", "base.yaml", cwd=lab)
    line = error_line("base.yaml")
    check_line(line, "arguments.no-option", "'base.yaml'")
    line = error_line("--config", str(lab))
    check_line(line, "arguments.folder", str(lab))
    with refused("arguments.no-config", "base.yaml"):
        owl_here("bench", "--config", "base.yaml", cwd=lab)


def test_a_missing_part_is_named(lab: Path, error_line: ErrorLine) -> None:
    write_config(lab / "part.yaml", {"trainer": {"max_steps": 3}})
    for line in (error_line("--config", "part.yaml"), error_line()):
        check_line(line, "arguments.missing-key", "data and model")
    experiment = tiny_experiment(Path("data"))
    del experiment["model"]["init_args"]["network"]
    write_config(lab / "part.yaml", experiment)
    line = error_line("--config", "part.yaml")
    check_line(line, "arguments.missing-key", "part.yaml: key 'model.init_args'", "network")
    check_line(error_line("--config"), "arguments.missing-value", "--config")
    with refused("arguments.missing-key", "directory"):
        owl_here("export", "a.ckpt", cwd=lab)


def test_a_missing_dataset_is_reported(error_line: ErrorLine, lab: Path) -> None:
    # the run folder exists by then
    write_config(lab / "wrong.yaml", {"runs": "elsewhere"})
    line = error_line("--config", "base.yaml", "--config", "wrong.yaml")
    check_line(line, "dataset.missing", "data")


def test_a_folder_that_cannot_be_written_is_reported(error_line: ErrorLine) -> None:
    assert "/proc/runs" in error_line("--config", "base.yaml", "--runs", "/proc/runs")


def test_debug_shows_where_it_happened(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(lab / "wrong.yaml", at("trainer.max_step", 3))
    monkeypatch.setattr(sys, "argv", ["owl", "fit", "--config", "wrong.yaml", "--debug"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with refused("arguments.unknown-key", "'trainer.max_step'", "'max_steps'"):
        main()


def test_a_refusal_without_a_reason_is_reported_in_the_parsers_words(lab: Path) -> None:
    """References are compared as they stand, not by what they give; an optimizer gets its weights later."""
    learning_rate = at("init_args.optimizer.init_args.lr", "${name}")
    write_config(lab / "wrong.yaml", {"model": learning_rate, "name": "many"})
    with refused("arguments.invalid", "many"):
        owl_here("fit", "--config", "base.yaml", "--config", "wrong.yaml", cwd=lab)
