"""In which dtypes a process multiplies, also one that trains, encodes and rolls out on a lesser CPU."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from owl import hardware
from tests.helpers.shards import AXES, BUTTONS, make_dataset
from tests.helpers.tiny import REPOSITORY, owl_here
from tests.helpers.world import AUTOENCODER, FOOTAGE, LATENTS, WORLD_MODEL

FILE = "dtypes.json"
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "convolution", "convolution_backward"}
FAST, SLOW = hardware.Rates(bfloat16=300e9, float32=165e9), hardware.Rates(bfloat16=1e9, float32=165e9)
DATA = ("--data.batch_size", "2", "--data.num_workers", "0", "--data.validation_windows", "2")
SHORT = ("--trainer.max_steps", "2", "--trainer.max_time", "null", "--trainer.callbacks", "null")
SMALL = (
    "--frames",
    "3",
    "--clips",
    "1",
    "--horizon",
    "2",
    "--context",
    "2",
    "--side_by_side",
    "1",
    "--steps",
    "2",
    "--starts",
    "0",
)


class Dtypes(TorchDispatchMode):
    """Notes the dtypes of all that operators take and give.

    Attributes:
        products: Of matrix products and convolutions, by name.
        others: Of everything else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: dict[str, set[str]] = defaultdict(set)
        self.others: dict[str, set[str]] = defaultdict(set)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        found = {str(x.dtype).removeprefix("torch.") for x in tensors if x.is_floating_point()}
        (self.products if name in PRODUCTS else self.others)[name].update(found)
        return result

    def summary(self) -> dict[str, dict[str, list[str]]]:
        """Both, as JSON has them."""
        both = {"products": self.products, "others": self.others}
        return {kind: {name: sorted(dtypes) for name, dtypes in sorted(ops.items())} for kind, ops in both.items()}


class RecordDtypes(Callback):
    """Writes those of all training steps, optimisers included, into the run folder."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.dtypes = Dtypes()
        self.dtypes.__enter__()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.dtypes.__exit__(None, None, None)
        (Path(trainer.default_root_dir) / FILE).write_text(json.dumps(self.dtypes.summary()))


class UnequalRanks(Callback):
    """Makes the first process one of a CPU with bfloat16 units and the others ones without."""

    def __init__(self) -> None:
        hardware.cpu_rates = lambda: FAST if os.environ["RANK"] == "0" else SLOW  # type: ignore[assignment]


def fit(folder: Path, name: str, *options: str) -> dict[str, Any]:
    """Train two steps of a shipped experiment; return its precision and its dtypes."""
    config = REPOSITORY / "experiments" / f"{name}.yaml"
    record = ("--trainer.callbacks+", "tests.helpers.arithmetic.RecordDtypes")
    assert owl_here("fit", "--config", config, *DATA, *SHORT, *record, *options, cwd=folder) == 0
    run = folder / "runs" / name
    precision = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["precision"]
    return {"precision": precision, **json.loads((run / FILE).read_text())}


def without_units(folder: Path) -> None:
    """Do what `make world` does, at a tiny size, in a process that has multiplied nothing yet; notes what it used.

    From then on its CPU has neither AVX-512 nor bfloat16.
    """
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"  # read before the first product
    make_dataset(folder / FOOTAGE, episodes=4, frames=24, size=(96, 160), modalities=("rgb", "controls"))
    found: dict[str, Any] = {"fast": hardware.multiplies_bfloat16("cpu"), "cost": hardware.cost_of_bfloat16("cpu")}
    small = ("--model.network.widths", "[64]", "--model.network.blocks", "[1]")
    found["quickstart"] = fit(folder, "quickstart", "--data.path", FOOTAGE, "--data.record", "null", *small)
    assert owl_here("data", "encode", AUTOENCODER, FOOTAGE, LATENTS, cwd=folder) == 0
    controls = ("--model.network.buttons", json.dumps(BUTTONS), "--model.network.axes", json.dumps(AXES))
    sizes = ("--model.network.width", "64", "--model.network.depth", "2", "--model.compile", "false")
    found["world_model_quickstart"] = fit(folder, "world_model_quickstart", "--data.path", LATENTS, *controls, *sizes)
    with Dtypes() as dtypes:
        assert owl_here("rollout", WORLD_MODEL, "--data", LATENTS, "--out", "rollout", *SMALL, cwd=folder) == 0
    report = (folder / "rollout" / "report.md").read_text()
    precision = next(name for name in ("bf16", "fp32") if f"--precision {name}" in report)
    found["rollout"] = {"precision": precision, **dtypes.summary()}
    (folder / "found.json").write_text(json.dumps(found))
