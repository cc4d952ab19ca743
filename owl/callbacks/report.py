"""Write the results of a run: metrics.json, report.md, a table in the terminal, and metadata in checkpoints."""

import json
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_summary import get_human_readable_count
from rich.console import Console
from rich.table import Table

from owl import models
from owl.atomic import atomic_write
from owl.callbacks.throughput import Throughput
from owl.configuration import dump
from owl.environment import environment
from owl.errors import OwlError
from owl.nn.frozen import trained
from owl.seeds import run_seed
from owl.version import code_version
from owl.viz.numbers import format_number

ENVIRONMENT = "environment.json"


class Report(Callback):
    """Write the results of a run and store its metadata in every checkpoint.

    When training starts, ``environment.json`` is written, which describes the environment of the run (see
    `owl.environment`). After ``fit`` the run folder contains ``metrics.json`` (flat: metric name to number, with
    ``steps``, ``seconds``, ``seed``), and ``report.md`` with the same numbers, the last pictures, clips and sounds, and
    the command that repeats the run. ``validate`` and ``test`` write ``validate.json`` and ``test.json``.

    Every checkpoint stores, under ``owl``, the recipe's class, class and arguments of each network that it exports, the
    complete configuration, the code version, the dataset's identity, and the metrics so far, from which ``fit`` repeats
    the report of a finished run.
    """

    def __init__(self) -> None:
        self.configuration: dict[str, Any] = {}
        self.seconds = 0.0
        self._start = 0.0
        self._restored: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what is trained."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        folder = Path(trainer.default_root_dir)
        weights = get_human_readable_count(sum(p.numel() for p in trained(pl_module).values())).strip()
        where = f"{trainer.world_size} x {trainer.strategy.root_device.type}"
        Console(markup=False).print(
            f"{folder.name}: {type(pl_module).__name__} of {weights} trained parameters, {trainer.precision} on {where}"
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the timer and write environment.json, which describes the last part of a resumed run.

        Not called if no steps are left to train.
        """
        self._start = time.monotonic()
        if trainer.is_global_zero and not trainer.fast_dev_run:
            content = json.dumps(environment(), indent=2) + "\n"
            atomic_write(Path(trainer.default_root_dir) / ENVIRONMENT, content)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the recipe, its networks, the configuration, code version, dataset and metrics."""
        recipe = type(pl_module)
        networks = {name: models.describe(network) for name, network in models.exported(pl_module).items()}
        checkpoint["owl"] = {
            "recipe": f"{recipe.__module__}.{recipe.__qualname__}",
            "networks": {name: description for name, description in networks.items() if description},
            "config": self.configuration,
            "code_version": code_version(),
            "dataset": self.dataset_identity(trainer),
            "metrics": self.metrics(trainer),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the elapsed time and the metrics of the interrupted run."""
        self._restored = checkpoint.get("owl", {}).get("metrics", {})
        self.seconds = self._restored.get("seconds", 0.0)

    @staticmethod
    def dataset_identity(trainer: Trainer) -> dict[str, Any] | None:
        """Return the data module's description of its dataset, or None."""
        identity = getattr(trainer.datamodule, "identity", None)
        return identity() if identity else None

    def elapsed(self) -> float:
        """Return the seconds of fit so far, across all resumes."""
        return self.seconds + (time.monotonic() - self._start if self._start else 0.0)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write metrics.json and report.md, print the table."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        trained = self._start > 0
        if not trained and not self._restored:
            raise OwlError("run.nothing-to-train", f"no training step was made: {why_not(trainer)}; change that")
        metrics = self.metrics(trainer) if trained else self._restored
        folder = Path(trainer.default_root_dir)
        atomic_write(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        atomic_write(folder / "report.md", self.markdown(folder, metrics))
        print_table(f"{folder.name}: {trainer.global_step} steps", metrics)
        if not trained:
            Console(markup=False).print(f"No steps are left to train: {why_not(trainer)}.", soft_wrap=True)
        curves = any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
        where = f"   TensorBoard: tensorboard --logdir {folder.parent}" if curves else ""
        Console(markup=False).print(f"Report: {folder / 'report.md'}{where}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print the metrics of the validate command."""
        self._write_evaluation(trainer, "validate")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print the metrics of the test command."""
        self._write_evaluation(trainer, "test")

    def _write_evaluation(self, trainer: Trainer, name: str) -> None:
        if trainer.state.fn != name or not trainer.is_global_zero:
            return
        metrics = {key: float(value) for key, value in sorted(trainer.callback_metrics.items())}
        path = Path(trainer.default_root_dir) / f"{name}.json"
        atomic_write(path, json.dumps(metrics, indent=2) + "\n")
        print_table(f"{path.parent.name}: {name}", metrics)
        Console(markup=False).print(f"Written to {path}")

    def metrics(self, trainer: Trainer) -> dict[str, float]:
        """Return the run's last metrics, flat, with steps, seconds, seed and speed."""
        metrics = {key: float(value) for key, value in sorted(trainer.callback_metrics.items())}
        metrics["steps"] = trainer.global_step
        metrics["seconds"] = round(self.elapsed(), 1)
        metrics["seed"] = run_seed()
        throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)
        if throughput and throughput.step_seconds:
            total = throughput.step_seconds + throughput.wait_seconds
            metrics["data_wait"] = round(throughput.wait_seconds / total, 5)
        return metrics

    def markdown(self, folder: Path, metrics: dict[str, float]) -> str:
        """Return the report's text."""
        rows = "\n".join(f"| {name} | {format_number(value)} |" for name, value in metrics.items())
        steps = sorted((folder / "media").glob("step-*"))
        pictures = sorted(steps[-1].glob("*.png")) if steps else []
        clips = sorted(steps[-1].glob("*.mp4")) if steps else []
        sounds = sorted(steps[-1].glob("*.wav")) if steps else []
        shown = "\n\n".join(
            [f"![{p.stem}]({p.relative_to(folder).as_posix()})" for p in pictures]
            + [f"Clip: [{p.name}]({p.relative_to(folder).as_posix()})" for p in clips]
            + [f"Sound: [{p.name}]({p.relative_to(folder).as_posix()})" for p in sounds]
        )
        table = f"| metric | value |\n| --- | ---: |\n{rows}"
        written, details = f"Written {time.strftime('%Y-%m-%d %H:%M')} by OWL {code_version()}.", ""
        if self.configuration:  # a run from Python has none
            written += f" Repeat and compare with:\n\n    python -m owl rerun {folder}"
            yaml = f"```yaml\n{dump(self.configuration)}```"
            details = f"<details><summary>Configuration</summary>\n\n{yaml}\n\n</details>"
        return "\n\n".join(filter(None, [f"# {folder.name}", written, table, shown, details])) + "\n"


def why_not(trainer: Trainer) -> str:
    """Return the reason why Lightning made no training step."""
    step, last = trainer.global_step, trainer.max_steps
    if trainer.limit_train_batches == 0:
        return "trainer.limit_train_batches is 0"
    if 0 < last <= step:
        return f"it was already finished, at step {step} with trainer.max_steps {last}; increase that to train longer"
    if last == 0:
        return "trainer.max_steps is 0"
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch:
        return f"{trainer.current_epoch} epochs are complete and trainer.max_epochs is {trainer.max_epochs}"
    if step > 0:
        return "it was already finished; increase trainer.max_time or trainer.max_steps, whichever ended it"
    return "it was stopped before its first step, for example by a trainer.max_time of 0"


def print_table(title: str, metrics: dict[str, float]) -> None:
    """Print metrics as a table."""
    table = Table("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, format_number(value))
    show_table(title, table)


def show_table(title: str, table: Table) -> None:
    """Print a table below a title, which may be wider: as the table's own it would be broken at the table's width."""
    console = Console(markup=False)
    console.print(title, soft_wrap=True)
    console.print(table)
