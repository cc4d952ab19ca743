"""Measure the training speed of an experiment on some real steps of its recipe, data and trainer."""

import json
import math
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.profiler import profile

from owl.atomic import atomic_write
from owl.bench.measurement import (
    PROFILED,
    Measurement,
    most_expensive,
    peak_memory,
    reset_peak_memory,
    start_profiler,
)
from owl.bench.roofline import (
    Operator,
    Operators,
    Precision,
    data_sheet_of,
    matmul_rate,
    synchronize,
    total_flops,
)
from owl.callbacks.checkpoint import Checkpoint
from owl.callbacks.frozen_encoder import FrozenEncoder
from owl.callbacks.report import Report
from owl.callbacks.throughput import Throughput, samples_in
from owl.configuration import dump
from owl.errors import OwlError
from owl.hardware import DTYPES
from owl.optim.stepping import cycle_of

RESULT = "bench.json"
TRACE = "trace.json"
NEVER = 2**40
"""Steps between checkpoints."""


class StepMeter(Callback):
    """Measure optimiser steps and write ``bench.json`` into the run folder, and nothing else.

    The first step runs uncompiled to count its operators. Then follow warm-up steps, during which code is compiled, the
    measured steps, and, for kernels and traces, some steps under the profiler. The default callbacks that write reports
    are removed.

    If optimisers are stepped at different cadences (`owl.optim.stepping.ManualStep.due`), operators are counted over
    the first cycle, whole cycles are measured, and all results are means per step.

    Args:
        steps: Number of measured steps; rounded up to whole cycles.
        warm_up: Number of steps before, at least 1.
        kernels: Rows of the kernel table; 0 for none.
        trace: Whether to write a Chrome trace, ``trace.json``.
    """

    def __init__(self, steps: int, warm_up: int, kernels: int = 0, trace: bool = False) -> None:
        self.steps, self.warm_up, self.kernels, self.trace = steps, warm_up, kernels, trace
        self._cycle = 1
        self._operators = Operators()
        self._counting = ExitStack()
        self._step = self._samples = 0
        self._begin = self._wait = self._start = self._end = 0.0
        self._profiler: profile | None = None
        self._result: dict[str, Any] = {}

    @property
    def total(self) -> int:
        """Steps altogether."""
        return self._first + self.steps + (PROFILED if self.kernels or self.trace else 0)

    @property
    def _first(self) -> int:
        """Steps before the measured ones."""
        return self._cycle + self.warm_up

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the callbacks that write reports."""
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, Report | Throughput)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the optimisers, to count their operators separately."""
        for optimizer in trainer.optimizers:
            if not pl_module.automatic_optimization:  # with automatic optimisation, step() also computes the gradients
                optimizer.register_step_pre_hook(self._before_optimizer)
            optimizer.register_step_post_hook(self._after_optimizer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Mark the end of the forward and backward pass."""
        self._before_optimizer()

    def _before_optimizer(self, *arguments: Any) -> None:
        self._operators.optimizer = True

    def _after_optimizer(self, *arguments: Any) -> None:
        self._operators.optimizer = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the time since the last batch as waiting; count operators in the first cycle."""
        self._wait += time.perf_counter() - self._end
        if self._step < self._cycle:
            self._counting.enter_context(torch.compiler.set_stance("force_eager"))  # fused operators are not counted
            self._counting.enter_context(self._operators)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Switch to the next phase after an optimiser step when due."""
        self._counting.close()
        self._samples += samples_in(batch) * trainer.world_size
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            if self._step == 1:
                self._cycle = cycle_of(pl_module)
                self.steps = math.ceil(self.steps / self._cycle) * self._cycle
                trainer.fit_loop.epoch_loop.max_steps = self.total
            self._advance(trainer, pl_module, pl_module.device.type)
        self._end = time.perf_counter()

    def _advance(self, trainer: Trainer, pl_module: LightningModule, device: str) -> None:
        if self._step == self._first:
            reset_peak_memory(device)
            synchronize(device)
            self._begin, self._wait, self._samples = time.perf_counter(), 0.0, 0
        if self._step == self._first + self.steps:
            synchronize(device)
            self._result = self._measured(trainer, device, time.perf_counter() - self._begin)
            self._result["compiled"] = any(m._compiled_call_impl is not None for m in pl_module.modules())
            if self.total > self._step:
                self._profiler = start_profiler(device)
        if self._step == self.total:
            trainer.callbacks = [
                c for c in trainer.callbacks if not isinstance(c, Checkpoint)
            ]  # it would save at the end
            self._finish(trainer, device)

    def _measured(self, trainer: Trainer, device: str, seconds: float) -> dict[str, Any]:
        memory = peak_memory(device)  # before matrices are allocated to measure the rate of their products
        precision = trained_precision(str(trainer.precision))
        calls = {call: count / self._cycle for call, count in self._operators.calls.items()}
        rate, flops = matmul_rate(device, DTYPES[precision]), total_flops(calls)
        metrics = {
            "steps_per_second": self.steps / seconds,
            "samples_per_second": self._samples / seconds,
            "gflop_per_step": flops / 1e9,
            "gflop_per_step_of_optimizer": total_flops(calls, optimizer=True) / 1e9,
            "matmul_gflop_per_second": rate / 1e9,
            "mfu": flops * self.steps / seconds / rate,
            "peak_memory_mib": memory,
            "data_wait": self._wait / seconds,
        }
        sheet = data_sheet_of(torch.cuda.get_device_name()) if device == "cuda" else None
        if sheet is not None:
            metrics["mfu_of_data_sheet"] = flops * self.steps / seconds / sheet.rates[precision]
        return {
            "device": device,
            "precision": precision,
            "metrics": metrics,
            "operators": [[*call, count] for call, count in calls.items()],
        }

    def _finish(self, trainer: Trainer, device: str) -> None:
        folder = Path(trainer.default_root_dir)
        if self._profiler is not None:
            synchronize(device)
            self._profiler.stop()
            self._result["kernels"] = most_expensive(self._profiler, self.kernels, device)
        if not trainer.is_global_zero:
            return
        if self._profiler is not None and self.trace:
            self._profiler.export_chrome_trace(str(folder / TRACE))
        atomic_write(folder / RESULT, json.dumps(self._result))


def trained_precision(name: str) -> Precision:
    """Return the precision of a trainer's matrix products: "fp32", or "bf16" for all others."""
    return "fp32" if name.startswith(("32", "64")) else "bf16"


def measure_training(
    experiment: str, options: list[str], steps: int, warm_up: int, kernels: int, trace: Path | None
) -> Measurement:
    """Run some steps of an experiment like fit, in a temporary run folder.

    Validation, checkpoints, loggers and the callbacks of the experiment are disabled, except for the encoder of its
    batches.

    Args:
        experiment: YAML file.
        options: Additional options of fit.
        steps: Number of measured steps.
        warm_up: Number of steps before, at least 1.
        kernels: Rows of the kernel table; 0 for none.
        trace: Where to write a Chrome trace.

    Raises:
        OwlError: The experiment cannot be trained, or was stopped.
    """
    from owl.cli.lightning import run_silently

    meter = StepMeter(steps, warm_up, kernels, trace is not None)
    described = {
        "class_path": "owl.bench.training.StepMeter",
        "init_args": {"steps": steps, "warm_up": warm_up, "kernels": kernels, "trace": meter.trace},
    }
    with tempfile.TemporaryDirectory() as folder:
        callbacks = Path(folder) / "callbacks.yaml"  # in a file, references to other keys are resolved
        atomic_write(callbacks, dump({"trainer": {"callbacks": [described, *encoders_of(experiment)]}}))
        arguments = [
            *("fit", "--config", experiment, "--config", str(callbacks), *options),
            *("--name", "bench", "--runs", folder, "--overwrite", "false", "--ckpt_path", "null"),
            *("--trainer.max_steps", str(meter.total), "--trainer.max_epochs", "-1", "--trainer.max_time", "null"),
            *("--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0"),
            *("--trainer.logger", "false", "--trainer.enable_progress_bar", "false"),
            *("--checkpoint.every_n_steps", str(NEVER)),
        ]
        run_silently(arguments)
        result = Path(folder) / "bench" / RESULT
        if not result.exists():
            raise OwlError(
                "bench.cut-short",
                f"{experiment} stopped before {meter.total} steps; increase its time limit or reduce --steps",
            )
        content = json.loads(result.read_bytes())
        if trace is not None:
            atomic_write(trace, (result.parent / TRACE).read_bytes())
    operators = {Operator(*call): count for *call, count in content.pop("operators")}
    return Measurement("training", "step", operators=operators, **content)


def encoders_of(experiment: str) -> list[dict[str, Any]]:
    """Return the callbacks of an experiment without which its batches lack latents, as in its YAML."""
    try:
        callbacks = yaml.safe_load(Path(experiment).read_bytes())["trainer"]["callbacks"]
        return [callback for callback in callbacks if callback["class_path"].endswith(FrozenEncoder.__name__)]
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError):
        return []  # there are none, or fit explains what is wrong
