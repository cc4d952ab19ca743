"""``python -m owl bench``: measure the speed of experiments and networks, and predict it for other devices."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from owl import environment, models
from owl.atomic import atomic_write
from owl.bench import roofline
from owl.bench.inference import measure_network
from owl.bench.measurement import PROFILED, Measurement
from owl.bench.training import measure_training
from owl.callbacks.report import show_table
from owl.errors import OwlError, at_least
from owl.hardware import default_device, multiplies_bfloat16
from owl.version import code_version
from owl.viz.numbers import format_number

PREDICTION = "prediction_"  # prefix of metrics that were not measured
LONGEST_NAME = 60  # characters of a kernel's name in the terminal


def main(
    targets: list[str],
    *,
    steps: int = 20,
    warm_up: int = 5,
    options: list[str] = [],  # noqa: B006  (never changed)
    precision: Literal["bf16", "fp32"] | None = None,
    compile: bool = False,
    decoder: str | None = None,
    denoising_steps: int | None = None,
    predict: list[str] = [],  # noqa: B006  (never changed)
    kernels: int = 0,
    trace: str | None = None,
    out: str | None = None,
    compare: bool = False,
) -> None:
    """Measure the speed of training an experiment or of running a trained network.

    An experiment trains for some steps with its recipe, data and trainer, in a temporary run folder, without
    validation, checkpoints, loggers and its callbacks, except for FrozenEncoder. A network runs with batch size 1 on
    synthetic inputs: an autoencoder encodes and decodes, a decoder decodes, a world model generates frames. A GPU is
    used if there is one.

    Args:
        targets: Experiments (YAML), checkpoints (.ckpt) or exported folders; with --compare two files of results.
        steps: Number of measured training steps or frames.
        warm_up: Number of steps before the measured ones.
        options: For experiments: options of fit, given without this name: --trainer.precision bf16-mixed.
        precision: For networks: bf16 or fp32; default: bf16 if it is fast on the device, else fp32. Experiments set
            it in their YAML.
        compile: For networks: use torch.compile. Experiments set it in their YAML.
        decoder: For world models: checkpoint or export of the autoencoder that decodes its latents.
        denoising_steps: For world models: evaluations of the network per frame; by default those that it stores.
        predict: Devices to predict the speed of from counted operations and bytes: rtx5090, h100, h200, cpu (here).
        kernels: Rows of a table of the most expensive kernels.
        trace: File for a trace of a few steps, to be opened in chrome://tracing or ui.perfetto.dev.
        out: JSON file for the results.
        compare: Print the ratios of two earlier results, given as targets, instead of measuring.
    """
    if compare:
        return print_comparison(targets)
    at_least(1, steps=steps, warm_up=warm_up, denoising_steps=denoising_steps)
    at_least(0, kernels=kernels)
    unknown = [name for name in predict if name not in (*roofline.DATA_SHEETS, "cpu")]
    if unknown:
        raise OwlError(
            "bench.device",
            f"there is no data sheet for {unknown[0]}, expected {', '.join(roofline.DATA_SHEETS)} or cpu; correct it",
        )
    if trace is not None and len(targets) != 1:
        raise OwlError(
            "bench.one-trace", f"--trace supports one target, {len(targets)} were given; give one, or omit --trace"
        )
    for target in targets:
        check_target(target)
    refuse_what_is_ignored(targets, options, {"precision": precision, "compile": compile, "decoder": decoder})
    results = {}
    for target in targets:
        file = Path(trace) if trace is not None else None
        if is_experiment(target):
            measured = measure_training(target, options, steps, warm_up, kernels, file)
        else:
            chosen = precision or ("bf16" if multiplies_bfloat16(default_device()) else "fp32")
            measured = measure_network(target, chosen, compile, decoder, denoising_steps, steps, warm_up, kernels, file)
        measured.metrics |= predicted(measured, predict)
        print_measurement(target, measured)
        if kernels:
            print_kernels(measured)
        results[target] = {name: value for name, value in asdict(measured).items() if name != "operators"}
    if out is not None:
        content = {
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "code_version": code_version(),
            "devices": environment.devices(),
            "steps": steps,
            "results": results,
        }
        atomic_write(out, json.dumps(content, indent=2) + "\n")
        print(f"Results: {out}")


def is_experiment(target: str) -> bool:
    """Return whether a target is the YAML of an experiment."""
    return target.endswith((".yaml", ".yml"))


def refuse_what_is_ignored(targets: list[str], of_fit: list[str], of_networks: dict[str, Any]) -> None:
    """Check that no given option would be ignored.

    Args:
        targets: Experiments, which take only options of fit, and networks, which take none of them.
        of_fit: Given options of fit.
        of_networks: Options of networks with their given values.

    Raises:
        OwlError: An option applies to none of the targets.
    """
    experiments = [target for target in targets if is_experiment(target)]
    given = [f"--{name}" for name, value in of_networks.items() if value]
    if given and len(experiments) == len(targets):
        raise OwlError(
            "bench.network-option",
            f"{given[0]} is for networks, and {experiments[0]} is an experiment, which sets it in its YAML; give an "
            "option of fit, such as --trainer.precision",
        )
    if of_fit and not experiments:
        raise OwlError(
            "bench.experiment-option", f"{of_fit[0]} is for experiments, and {targets[0]} is a network; omit it"
        )


def check_target(target: str) -> None:
    """Check that a target is an experiment or a network.

    Raises:
        OwlError: It is neither.
    """
    kinds = "an experiment (.yaml), a checkpoint (.ckpt) or a folder written by export"
    if not Path(target).exists():
        raise OwlError("bench.missing", f"{target} does not exist, expected {kinds}; correct the path")
    file = is_experiment(target) or target.endswith(models.CHECKPOINT_SUFFIX)
    if not file and not (Path(target) / models.WEIGHTS).is_file():
        raise OwlError("bench.target", f"{target} is not {kinds}; give one of these")


def predicted(measured: Measurement, devices: list[str]) -> dict[str, float]:
    """Predict the milliseconds on devices by `owl.bench.roofline.predict`, with names that mark predictions."""
    calls = measured.operators
    values: dict[str, float] = {}
    for name in devices:
        device = roofline.find_device(name)
        convertible = "fp8" in device.rates and any(call.linear and call.precision == "bf16" for call in calls)
        for fp8 in (False, True) if convertible else (False,):
            low, high = roofline.predict(calls, device, fp8)
            label = f"{PREDICTION}{name}_{'fp8' if fp8 else measured.precision}_ms_per_{measured.unit}"
            values |= {f"{label}_fused": low * 1e3, f"{label}_unfused": high * 1e3}
    return values


def print_measurement(target: str, measured: Measurement) -> None:
    """Print the metrics, with predictions in a separate table."""
    device = torch.cuda.get_device_name() if measured.device == "cuda" else "CPU"
    how = f"{measured.precision}, {'compiled' if measured.compiled else 'eager'}, {device}"
    table = Table("measured", how)
    table.columns[1].justify = "right"
    for name, value in measured.metrics.items():
        if not name.startswith(PREDICTION):
            table.add_row(name, format_number(value))
    table.add_section()
    for name, value in measured.metrics.items():
        if name.startswith(PREDICTION):
            table.add_row(name, format_number(value))
    show_table(f"{target} ({measured.kind})", table)


def print_kernels(measured: Measurement) -> None:
    """Print the most expensive kernels."""
    table = Table("kernel")
    for name in ("calls", "ms", "share"):
        table.add_column(name, justify="right")
    for row in measured.kernels:
        name = row["name"][:LONGEST_NAME]
        table.add_row(name, str(row["calls"]), format_number(row["milliseconds"]), f"{row['share']:.1%}")
    show_table(f"Time of {PROFILED} x 1 {measured.unit}", table)


def print_comparison(files: list[str]) -> None:
    """Print the metrics of two results and their ratios, for each target.

    Raises:
        OwlError: There are not two results with a common target; results of one target each need no common name.
    """
    if len(files) != 2:
        raise OwlError("bench.compare", f"--compare got {len(files)} files, expected two written by --out; give two")
    before, after = (load_results(file) for file in files)
    pairs = [(name, name) for name in before if name in after]
    if not pairs and len(before) == len(after) == 1:
        pairs = [(next(iter(before)), next(iter(after)))]
    if not pairs:
        raise OwlError(
            "bench.compare", f"{files[0]} and {files[1]} have no target in common; give results of the same targets"
        )
    for old, new in pairs:
        name = old if old == new else f"{old} against {new}"
        table = Table("metric")
        for column in (*files, "ratio"):
            table.add_column(column, justify="right")
        for metric, value in before[old]["metrics"].items():
            if metric in after[new]["metrics"]:
                other = after[new]["metrics"][metric]
                ratio = f"{other / value:.3f}" if value else "-"
                table.add_row(metric, format_number(value), format_number(other), ratio)
        show_table(name, table)


def load_results(file: str) -> dict[str, Any]:
    """Load the results from a file written by --out, by target.

    Raises:
        OwlError: The file is missing or contains no results.
    """
    try:
        results: dict[str, Any] = json.loads(Path(file).read_bytes())["results"]
        if all(isinstance(result["metrics"], dict) for result in results.values()):
            return results
    except FileNotFoundError as error:
        raise OwlError(
            "bench.missing", f"{file} does not exist, expected a file written by `bench --out`; correct the path"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise OwlError("bench.results", f"{file} contains no results, expected a file written by `bench --out`; give one")
