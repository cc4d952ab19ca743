"""Float8 training: what is rounded and what is not, for which layers, with the same checkpoints, compiled or not."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from owl import models
from owl.data.datamodule import ShardDataModule
from owl.hardware import multiplies_bfloat16, trainer_precision
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.world_model import WorldTransformer
from owl.nn.frozen import freeze
from owl.precision import fp8
from owl.precision.fp8 import Float8Precision, Recipe, convert, float8_layers, why
from owl.recipes.world_model import WorldModel
from tests.helpers.errors import refused
from tests.helpers.latents import TINY, dot_experiment, draw, lively, make_latents
from tests.helpers.tiny import REPOSITORY, owl_here, quiet_trainer, write_config
from tests.test_docs import commands, leave
from tests.test_experiments import DATA, TRAINER, options, shrink_world_model

PLUGIN = "owl.precision.fp8.Float8Precision"
RECIPES: tuple[Recipe, ...] = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


def gentle(**changes: Any) -> WorldTransformer:
    """A world model whose attention does not turn small differences into large ones."""
    network = lively(**changes).train()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.mul_(0.5)
    return network


def step(network: WorldTransformer, autocast: bool = True) -> tuple[Tensor, Tensor]:
    """Velocity and gradient of all weights, of eight frames of two clips."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        velocity = network(*draw(network, 8, 2))["video"].float()
    network.zero_grad()
    velocity.square().mean().backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return velocity.detach(), torch.cat(gradients).clone()


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def rounded(x: Tensor, dtype: torch.dtype, scale_of: Tensor | None = None) -> Tensor:
    scale = torch.finfo(dtype).max / (x if scale_of is None else scale_of).abs().max()
    return (x * scale).to(dtype).float() / scale


def test_a_layer_multiplies_what_eight_bits_hold() -> None:
    """The definition, by hand: e4m3 for what goes forward, e5m2 for gradients, one scale per tensor, float32 sums."""
    network = nn.Sequential(nn.Linear(32, 16))
    weight, bias = (p.detach().clone() for p in network.parameters())
    convert(network, "tensorwise", True, [], False)
    x, gradient = torch.randn(48, 32, requires_grad=True), torch.randn(48, 16)
    output = network(x)
    output.backward(gradient)
    few, many = torch.float8_e4m3fn, torch.float8_e5m2
    torch.testing.assert_close(output, rounded(x, few) @ rounded(weight, few).T + bias)
    torch.testing.assert_close(x.grad, rounded(gradient, many) @ rounded(weight, few))
    torch.testing.assert_close(network[0].weight.grad, rounded(gradient, many).T @ rounded(x.detach(), few))
    torch.testing.assert_close(network[0].bias.grad, gradient.sum(0))


@pytest.mark.parametrize("recipe", RECIPES)
def test_emulated_float8_is_near_bfloat16(recipe: Recipe) -> None:
    velocity, gradient = step(gentle())
    network = gentle()
    convert(network, recipe, True, [], False)
    found_velocity, found_gradient = step(network)
    assert 0.005 < error(found_velocity, velocity) < 0.1  # bfloat16 alone errs by less than the first
    assert 0.005 < error(found_gradient, gradient) < 0.1


def test_this_machine_runs_what_the_probe_says() -> None:
    velocity, gradient = step(gentle())
    for recipe in RECIPES:
        if fp8.probe(recipe, torch.device("cpu")) is None:
            network = gentle()
            convert(network, recipe, False, [], False)
            assert error(step(network)[0], velocity) < 0.1
            assert error(step(network)[1], gradient) < 0.1


def test_the_layers_give_bfloat16_where_autocast_does() -> None:
    network = nn.Sequential(nn.Linear(32, 16))
    convert(network, "tensorwise", True, [], False)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(torch.randn(16, 32)).dtype == torch.bfloat16
    assert network(torch.randn(16, 32)).dtype == torch.float32


def test_names_and_weights_stay() -> None:
    before = lively()
    network = lively()
    convert(network, "tensorwise", True, [], False)
    assert list(network.state_dict()) == list(before.state_dict())
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in before.named_parameters()]
    for name, x in network.state_dict().items():
        assert type(x) is Tensor
        assert torch.equal(x, before.state_dict()[name])
    lively(seed=1).load_state_dict(network.state_dict())
    network.load_state_dict(lively(seed=1).state_dict())


def test_layers_are_chosen_by_name_and_by_shape() -> None:
    network = lively()  # 24 -> 32 channels would need padding: 2 * 2 * 2 = 8 numbers in a patch
    freeze(network.level)
    report = convert(network, "tensorwise", True, ["blocks.0.*", "*.modulation.*"], False)
    found = {name for name, layer in network.named_modules() if layer in float8_layers(network)}
    assert found == {"controls.second", *(f"blocks.1.{name}" for name in ("qkv", "out", "up", "down"))}
    assert report == (
        "5 of 15 linear layers: controls.second, blocks.*.qkv (1), blocks.*.out (1), blocks.*.up (1), blocks.*.down "
        "(1); not converted: video_out.modulation.linear, blocks.*.modulation.linear (2), blocks.*.qkv (1), "
        "blocks.*.out (1), blocks.*.up (1), blocks.*.down (1) by name; controls.first, video_in, video_out.linear by "
        "shape; everything that is no linear layer"
    )
    special = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 2), "linear": nn.Linear(32, 32)})
    convert(special, "tensorwise", True, [], False)  # attention's own kernel reads the weights of its layer
    assert float8_layers(special) == [special["linear"]]


@pytest.mark.parametrize(
    ("build", "skip", "code", "tokens"),
    [
        (lively, ["blocks.*.qvk"], "fp8.skip", ["blocks.*.qvk", "blocks.*.qkv (2)"]),
        (lively, ["*"], "fp8.layers", ["WorldTransformer has 17", "17 of them skipped", "0 of sizes"]),
        (
            lambda: ImageAutoencoder(3, (32, 48), (4, 6), 4, [8, 16, 16], [1, 1, 1]),
            [],
            "fp8.layers",
            ["ImageAutoencoder has 0", "bf16-mixed"],
        ),
    ],
)
def test_what_cannot_be_converted_is_reported(
    build: Callable[[], nn.Module], skip: list[str], code: str, tokens: list[str]
) -> None:
    with refused(code, *tokens):
        convert(build(), "tensorwise", True, skip, False)


def test_numbers_of_tokens_that_gpus_refuse_are_reported() -> None:
    network = gentle()
    convert(network, "tensorwise", True, [], False)
    inputs = draw(network, 7, 2)
    with refused("fp8.multiple", "level.first got 2 x 7 tokens", "(tensorwise)", "multiple of 16"):
        network(*inputs)
    with torch.no_grad():  # the gradient of the weights alone needs it
        network(*inputs)
    network = gentle()
    convert(network, "rowwise_with_gw_hp", True, [], False)
    network(*inputs)


def test_compiled_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gentle(depth=1, global_every=0)
    convert(expected, "tensorwise", True, [], False)
    network = gentle(depth=1, global_every=0)
    network.blocks[0].compile(backend="aot_eager")  # before converting, as recipes do
    convert(network, "tensorwise", True, [], False)
    for found, wanted in zip(step(network, autocast=False), step(expected, autocast=False), strict=True):
        assert error(found, wanted) < 1e-5
    skipped = ["level.*", "controls.*", "video_out.*"]
    short = gentle(depth=1, global_every=0)
    short.blocks[0].compile(backend="aot_eager")
    convert(short, "tensorwise", True, skipped, False)
    with refused("fp8.multiple", "blocks.0.modulation.linear got 2 x 7 tokens"):
        short(*draw(short, 7, 2))


def test_what_a_device_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with refused("fp8.device", "(tensorwise)", "META", "trainer.precision"):
        why("tensorwise", False, torch.device("meta"))
    assert "emulated on the META" in why("tensorwise", True, torch.device("meta"))
    faults = {"rowwise": "RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED"}  # as on an RTX 5090
    monkeypatch.setattr(fp8, "probe", lambda recipe, device: faults.get(recipe))
    assert why("tensorwise", False, torch.device("cpu")) == (
        "tensorwise, as configured; tried on the CPU: tensorwise, rowwise_with_gw_hp run, rowwise does not "
        "(RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED)"
    )
    with refused("fp8.device", "(rowwise)", "CUBLAS_STATUS_NOT_SUPPORTED", "tensorwise or rowwise_with_gw_hp"):
        why("rowwise", False, torch.device("cpu"))


def test_a_recipe_that_gives_wrong_numbers_is_found() -> None:
    def doubled(layer: nn.Linear) -> nn.Module:
        layer.weight.data *= 2
        return layer

    assert fp8.fault(doubled, torch.device("cpu"), train=False) == "its output is wrong by 100%"
    assert fp8.fault(lambda layer: layer, torch.device("cpu"), train=True) is None
    state = torch.get_rng_state()
    fp8.probe("tensorwise", torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "code", "tokens"),
    [
        ({"recipe": "mxfp8"}, "fp8.recipe", ["mxfp8", "tensorwise, rowwise, rowwise_with_gw_hp"]),
        ({"recipe": "rowwise", "float8_all_gather": True}, "fp8.all-gather", ["tensorwise", "found rowwise"]),
    ],
)
def test_settings_that_make_no_sense_are_reported(settings: dict[str, Any], code: str, tokens: list[str]) -> None:
    with refused(code, *tokens):
        Float8Precision(**settings)


def test_a_missing_torchao_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with refused("fp8.package", "pip install 'owl-platform[fp8]'"):
        Float8Precision()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with latents, bf16.yaml, and plugin.yaml to be added to it."""
    folder = tmp_path_factory.mktemp("fp8")
    data = make_latents(folder / "data", (20, 20, 12, 12))
    experiment = dot_experiment(data, max_steps=3)
    experiment["data"]["init_args"] |= {"length": 8, "validation_windows": 3}
    write_config(folder / "bf16.yaml", experiment)
    plugin = {"class_path": PLUGIN, "init_args": {"emulate": True, "skip": ["network.video_out.*"]}}
    write_config(folder / "plugin.yaml", {"trainer": {"plugins": [plugin]}})
    return folder


def fit(lab: Path, name: str, *options: str, plugin: bool = True) -> dict[str, float]:
    configs = [
        "--config",
        "bf16.yaml",
        *(["--config", "plugin.yaml"] if plugin else ["--trainer.precision=bf16-mixed"]),
    ]
    assert owl_here("fit", *configs, "--name", name, *options, cwd=lab) == 0
    return json.loads((lab / "runs" / name / "metrics.json").read_text())


def test_a_compiled_recipe_from_yaml_runs_float8(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    products = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        products.append(sum("autograd_apply" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    one_graph = ("--model.compile", "true", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0")
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: plain(module, backend=record))
    monkeypatch.setattr("owl.recipes.compilation.can_compile", lambda device: True)
    fit(lab, "compiled", *one_graph)
    assert sum(products) >= 10  # of the two blocks' layers
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("float8: ")]
    others = "bfloat16" if multiplies_bfloat16("cpu") else "float32"
    assert lines[0] == f"float8: tensorwise, emulated on the CPU: right numbers, slowly; all else in {others}"
    assert lines[1].startswith("float8: 13 of 17 linear layers: network.level.first, network.level.second")
    assert "network.video_out.linear" in lines[1].partition("not converted")[2]
    assert len(lines) == 2
    products.clear()
    torch._dynamo.reset()
    fit(lab, "compiled_bf16", *one_graph, plugin=False)
    assert products
    assert not any(products)


def test_checkpoints_move_between_float8_and_bfloat16(lab: Path) -> None:
    fit(lab, "there")
    fit(lab, "there", "--ckpt_path", "last", "--trainer.max_steps", "4", plugin=False)
    fit(lab, "there", "--ckpt_path", "last", "--trainer.max_steps", "5")
    assert owl_here("validate", "--config", "bf16.yaml", "--name", "there", "--ckpt_path", "last", cwd=lab) == 0
    plain = json.loads((lab / "runs/there/validate.json").read_text())
    configs = ("--config", "bf16.yaml", "--config", "plugin.yaml")
    assert owl_here("validate", *configs, "--name", "there", "--ckpt_path", "last", cwd=lab) == 0
    eight = json.loads((lab / "runs/there/validate.json").read_text())
    assert eight["val/loss"] == pytest.approx(plain["val/loss"], rel=0.01)
    assert eight["val/loss"] != plain["val/loss"]


def test_nothing_needs_torchao_but_the_plugin(lab: Path) -> None:
    fit(lab, "trained")
    script = (
        "import sys; sys.modules['torchao'] = None\n"
        "from owl import models\n"
        "from owl.rollout.engine import Engine\n"
        "from tests.helpers.tiny import owl_here\n"
        "from pathlib import Path\n"
        "assert owl_here('fit', '--config', 'bf16.yaml', '--name', 'without', cwd=Path.cwd()) == 0\n"
        "checkpoint = 'runs/trained/checkpoints/last.ckpt'\n"
        "Engine(models.load(checkpoint))\n"
        "assert owl_here('export', checkpoint, 'exported', cwd=Path.cwd()) == 0\n"
        "assert not [name for name in sys.modules if name.startswith(('torchao.', 'owl.precision.fp8'))]\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=lab, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    given = draw(lively(), 4)
    trained, exported = models.load(lab / "runs/trained/checkpoints/last.ckpt"), models.load(lab / "exported")
    with torch.no_grad():
        torch.testing.assert_close(exported(*given), trained(*given), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("options", "code", "tokens"),
    [
        (["--trainer.precision=bf16-mixed"], "trainer.refused", ["`precision=bf16-mixed`"]),
        (["--data.batch_size=1", "--data.length=5"], "fp8.multiple", ["network.level.first got 1 x 10 tokens"]),
    ],
)
def test_the_command_line_reports_what_is_wrong(lab: Path, options: list[str], code: str, tokens: list[str]) -> None:
    with refused(code, *tokens):
        fit(lab, "wrong", *options)


def test_float8_all_gather_is_for_fsdp2(lab: Path) -> None:
    plugin = [{"class_path": PLUGIN, "init_args": {"emulate": True, "float8_all_gather": True}}]
    write_config(lab / "gather.yaml", {"trainer": {"plugins": plugin}})
    with refused("fp8.all-gather", "FSDP2", "SingleDeviceStrategy"):
        fit(lab, "gather", "--config", "gather.yaml")


def trained_loss(lab: Path, plugins: dict[str, Any]) -> float:
    """The validation loss of a world model after 120 steps."""
    torch.manual_seed(0)
    recipe = WorldModel(WorldTransformer(**TINY), optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    data = ShardDataModule(
        str(lab / "data"), ["latent", "controls"], length=8, batch_size=8, num_workers=0, validation_windows=5
    )
    trainer = quiet_trainer(
        lab,
        max_steps=120,
        check_val_every_n_epoch=1000,
        **plugins,
    )
    trainer.fit(recipe, data)
    return trainer.validate(recipe, data, verbose=False)[0]["val/loss"]


def test_the_world_model_learns_as_well_as_without(lab: Path) -> None:
    expected = trained_loss(lab, {"precision": trainer_precision("cpu")})  # what the plugin leaves all else in
    assert expected < 1.0  # it started above
    # no worse: float32 and bfloat16 alone differ by 1.4% after these steps, which may as well be to its advantage
    assert trained_loss(lab, {"plugins": [Float8Precision(emulate=True)]}) < 1.01 * expected


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "trainer").glob("fp8_*.yaml")), ids=lambda p: p.stem)
def test_the_trainer_profiles_name_what_exists(path: Path) -> None:
    profile = yaml.safe_load(path.read_text())["trainer"]
    (plugin,) = profile["plugins"]
    assert plugin["class_path"] == PLUGIN
    made = Float8Precision(**plugin["init_args"])
    assert (made.recipe, made.emulate) == ("tensorwise", path.stem == "fp8_emulated")
    assert profile["precision"] is None  # the trainer takes one or the other


def test_the_commands_of_the_how_to_page(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda module: None)
    for folder in ("experiments", "configs"):
        (lab / folder).symlink_to(REPOSITORY / folder)
    data = make_latents(lab / "page", [40] * 4)
    smaller = [
        *options("model.network", shrink_world_model({"streams": {"video": {"patch": 2}}})),
        *options("trainer", TRAINER),
        *options("data", DATA | {"path": str(data), "batch_size": 4}),
    ]
    page = REPOSITORY / "docs" / "how-to" / "fp8.md"
    fits = [words for line in commands(page) if (words := shlex.split(line)[3:])[0] == "fit"]  # test_rollout.py: others
    assert len(fits) == 2
    monkeypatch.chdir(lab)
    for words in fits:
        if any("fp8_emulated" in word for word in words):
            assert owl_here(*words, *smaller, cwd=lab) == 0
        else:
            assert leave([*words, "--print_config"]) == 0  # it requires a GPU
