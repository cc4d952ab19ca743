"""``python -m owl fit|validate|test|predict``: LightningCLI with OWL's run folder, callbacks and one-line errors."""

import argparse
import gc
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import CodeType
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentError, Namespace, set_dumper, set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.trainer import _PRECISION_INPUT
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from owl.callbacks.budget import Budget
from owl.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from owl.callbacks.ema import EMA
from owl.callbacks.homogeneity import HomogeneousDevices
from owl.callbacks.media import Media
from owl.callbacks.nonfinite import NonFiniteGuard
from owl.callbacks.progress import Progress
from owl.callbacks.report import Report
from owl.callbacks.step_seed import StepSeed
from owl.callbacks.throughput import Throughput
from owl.checkpoint import load_checkpoint, other_network
from owl.cli.arguments import config_files
from owl.cli.mistakes import explain
from owl.configuration import check_file, dump
from owl.data.failures import worker_failure
from owl.distributed.fsdp2 import FullySharded  # noqa: F401 (registers its name with the trainer)
from owl.errors import OwlError
from owl.hardware import cost_of_bfloat16, trainer_precision
from owl.nn.frozen import completed, whole_state_dicts
from owl.run_folder import SaveConfig, run_files, training_in

CHATTER = (
    ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning calls a deprecated function of torch
    ".*module\\(s\\) in eval mode.*",  # intended for frozen parts
    ".*does not have many workers.*",  # small machines have few cores
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*overridden `transfer_batch_to_device` in both.*",  # both do the same; the recipe's is for other data modules
    ".*`srun` command is available on your system but is not used.*",  # intended on a login node
)
DESCRIPTIONS = {
    "fit": "Train a recipe. All settings come from YAML (--config, repeatable: later files win) and from options.",
    "validate": "Measure a checkpoint (--ckpt_path last|best|FILE) on the validation split.",
    "test": "Measure a checkpoint (--ckpt_path last|best|FILE) on the test split.",
    "predict": "Run a checkpoint (--ckpt_path last|best|FILE) on the test split and write its output.",
}
REFUSED = {
    "barebones": (
        True,
        "it disables checkpoints, logs and the report, which every run needs; omit it, and measure the speed with "
        "python -m owl bench",
    ),
    "enable_checkpointing": (
        False,
        "every run keeps checkpoints/last.ckpt; omit it (set the interval with checkpoint.every_n_steps)",
    ),
}
"""Values that Lightning's trainer accepts but OWL does not support, with the reason."""
OF_THE_RECIPE = {"gradient_clip_val": ("clip", (None, 0)), "accumulate_grad_batches": ("accumulate", (None, 1))}
"""Settings of the trainer that recipes with several optimisers have as arguments, and the values that set nothing."""
CKPT_PATH_HELP = {
    "fit": "last: resume this run, or start it if there is none; best; or a file to start from.",
    "others": "The checkpoint: last, best or a file.",
}


class Parser(LightningArgumentParser):
    """A parser that raises its errors, so that `main` can print them in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "exit_on_error": False, "allow_abbrev": False})

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """Check a configuration, also that sections and dataclass arguments have keys: jsonargparse accepts a number.

        Raises:
            TypeError: A value is invalid.
        """
        for section in self.groups or ():
            if not isinstance(namespace.get(section, namespace), Namespace | dict | str):  # a string names a file
                raise TypeError(f"{section} has no keys")
        super().validate(namespace, *args, **kwargs)


class OwlTrainer(Trainer):
    """Lightning's trainer, with ``precision: auto`` on the command line and in YAML.

    Args:
        precision: Double precision (64-true), full (32-true), mixed (bf16-mixed, 16-mixed), or auto: bf16-mixed or
            32-true, whichever is faster on this machine when a run starts. A resumed run keeps it.
    """

    def __init__(self, *args: Any, precision: _PRECISION_INPUT | Literal["auto"] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, precision=precision, **kwargs)  # type: ignore[arg-type]  # OwlCLI has resolved it


class OwlCLI(LightningCLI):
    """LightningCLI with run folders ``<runs>/<name>`` and OWL's default callbacks."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name and the default callbacks, each configurable under a top-level key."""
        parser.add_argument(
            "--name", type=str, default="", help="Name of the run; default: the file name of the last config."
        )
        parser.add_argument("--runs", type=str, default="runs", help="Folder of the run folders.")
        parser.add_argument(
            "--overwrite",
            type=bool,
            default=False,
            help="Start from scratch even if the run folder contains a checkpoint.",
        )
        parser.add_lightning_class_args(StepSeed, "step_seed")
        parser.add_lightning_class_args(NonFiniteGuard, "nonfinite")
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(Budget, "budget")
        parser.add_lightning_class_args(Media, "media")
        parser.add_lightning_class_args(Report, "report")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        self.sections = list(parser.groups or ())

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's is static
        """Return the command that runs only: the parser of each takes as long to build as to parse with."""
        return {sys.argv[1]: super().subcommands()[sys.argv[1]]}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        kwargs["description"] = DESCRIPTIONS[subcommand]
        kwargs["usage"] = f"python -m owl {subcommand} --config YAML [--config YAML ...] [--KEY VALUE ...]"
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        options = parser._option_string_actions
        options["--ckpt_path"].help = CKPT_PATH_HELP["fit" if subcommand == "fit" else "others"]
        options["--weights_only"].help = argparse.SUPPRESS  # always used for checkpoints
        if subcommand in ("validate", "test"):
            parser.set_defaults(verbose=False)  # the report prints the metrics
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Check the configuration files before they are parsed."""
        for file in config_files(sys.argv[1:]):
            check_file(file, self.sections)
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: LightningCLI would let hyperparameters inside the checkpoint override the command line."""

    def before_instantiate_classes(self) -> None:
        """Resolve the run folder and the checkpoint to resume from."""
        config = self.config[self.subcommand]
        config.name = config.name or run_name(sys.argv[1:])
        self.run_folder = Path(config.runs) / config.name
        config.ckpt_path = self._checkpoint(config.ckpt_path, config.overwrite)
        self.save_config_kwargs["earlier"] = run_files(self.run_folder) if config.overwrite else []
        if config.trainer.precision == "auto":
            config.trainer.precision = self._precision(config.trainer.accelerator, config.ckpt_path)

    def _precision(self, accelerator: Any, checkpoint: str | None) -> str | int:
        """Resolve ``auto``: the precision of a resumed run, otherwise the one that is fast on the device."""
        if self.subcommand == "fit" and checkpoint is not None:
            stored = load_checkpoint(checkpoint)["owl"]["config"].get("trainer", {}).get("precision")
            if stored is not None:
                return stored
        device = None if accelerator == "cpu" else torch.accelerator.current_accelerator(check_available=True)
        return trainer_precision(device or "cpu")

    def _checkpoint(self, path: str | None, overwrite: bool) -> str | None:
        """Resolve ``last`` and ``best`` to a file; a fit without ``last`` starts from scratch."""
        folder = self.run_folder / "checkpoints"
        last = folder / "last.ckpt"
        if path in ("last", "best"):
            file = folder / f"{path}.ckpt"
            if self.subcommand == "fit" and path == "last" and not file.exists():
                return None
            if not file.exists():
                advice = (
                    "set checkpoint.monitor to a metric to keep best.ckpt, or use last.ckpt, which every run keeps"
                    if path == "best" and last.exists()
                    else "train first (python -m owl fit) or give --ckpt_path a file"
                )
                raise OwlError("checkpoint.missing", f"{file} does not exist; {advice}")
            path = str(file)
        elif path is not None and "://" not in path and not Path(path).is_file():
            raise OwlError(
                "checkpoint.missing", f"--ckpt_path {path} does not exist; give a checkpoint file, 'last' or 'best'"
            )
        if self.subcommand != "fit":
            if path is None:
                raise OwlError(
                    "checkpoint.required", f"{self.subcommand} needs a checkpoint; add --ckpt_path last, best or a file"
                )
            return path
        is_own = path is not None and Path(path).resolve().parent == folder.resolve()
        if is_own and overwrite:
            raise OwlError(
                "run.overwrites-its-start",
                f"--overwrite true removes {path}, from which the run starts; omit one of the two, or choose "
                "another --name",
            )
        rehearsal = self.config[self.subcommand].trainer.fast_dev_run  # writes nothing
        if not is_own and not overwrite and not rehearsal and last.exists() and is_main_process():
            raise OwlError(
                "run.exists",
                f"{self.run_folder} already holds a run; continue it with --ckpt_path last, "
                f"choose another --name, or start from scratch with --overwrite true",
            )
        return path

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Configure the trainer with the run folder, the atomic checkpoint writer and the progress bar.

        Lightning's summary of the model is disabled; the report prints one line instead.
        """
        chosen = self._get(self.config_init, "trainer")
        for key, (value, advice) in REFUSED.items():
            if chosen.get(key) is value:
                raise OwlError("trainer.refused", f"trainer.{key} is {str(value).lower()}, but {advice}")
        if self.subcommand == "fit" and not self.model.automatic_optimization:
            for key, (argument, unset) in OF_THE_RECIPE.items():
                if argument in self.model.hparams and chosen.get(key) not in unset:
                    raise OwlError(
                        "trainer.refused",
                        f"trainer.{key} is {chosen.get(key)}, but {type(self.model).__name__} steps several optimisers "
                        f"itself; leave it out and set model.init_args.{argument}",
                    )
        plugins, callbacks = (as_list(chosen.get(key)) for key in ("plugins", "callbacks"))
        if chosen.get("max_time") is not None and any(isinstance(callback, Timer) for callback in callbacks):
            raise OwlError(
                "trainer.two-limits",
                "trainer.max_time has no effect with a Timer in trainer.callbacks, which Lightning uses instead; "
                "omit one of the two (both end training after a time)",
            )
        kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        kwargs["callbacks"] = [*callbacks, HomogeneousDevices()]
        if chosen.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            kwargs["callbacks"].append(Progress())
        if SLURMEnvironment.detect():  # its handling of SIGUSR1 does not resume exactly
            kwargs["plugins"].append(SLURMEnvironment(auto_requeue=False))
        kwargs["enable_model_summary"] = bool(chosen.get("enable_model_summary"))
        kwargs["default_root_dir"] = str(self.run_folder)
        if chosen.get("logger") in (None, True):
            kwargs["logger"] = TensorBoardLogger(self.run_folder, name="", version="")
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:  # unsupported devices, precisions or strategies
            raise refused_by_trainer(error) from error
        if trainer.precision in ("16-true", "bf16-true"):
            raise OwlError(
                "trainer.precision",
                f"trainer.precision is {trainer.precision}, in which small updates of the weights and of their average "
                f"are lost in rounding; use {str(trainer.precision).replace('true', 'mixed')}",
            )
        own = chosen.get("precision") is not None  # not set by a plugin
        cost = cost_of_bfloat16(trainer.strategy.root_device) if own and trainer.precision == "bf16-mixed" else None
        if cost is not None and is_main_process():
            print(f"{cost}; trainer.precision is {trainer.precision}, use --trainer.precision 32-true", flush=True)
        if isinstance(trainer.strategy, DDPStrategy):
            # Buffers are constants and statistics that are equal on all ranks: no broadcast needed at every step
            trainer.strategy._ddp_kwargs.setdefault("broadcast_buffers", False)
        return trainer

    def fit(self, **arguments: Any) -> None:
        """Train with a lock on the run folder."""
        locked = is_main_process() and not self.trainer.fast_dev_run
        with frozen_objects(), training_in(self.run_folder) if locked else nullcontext():
            self.trainer.fit(**arguments)

    def _dump_config(self) -> None:
        """Convert the configuration to a dictionary, without checking again what was checked when it was parsed."""
        if not hasattr(self, "config_dump"):
            options = {"skip_link_targets": False, "skip_none": False, "skip_validation": True, "format": "yaml"}
            self.config_dump = yaml.safe_load(self.parser.dump(self.config, **options))[self.subcommand]

    def after_instantiate_classes(self) -> None:
        """Pass the resolved configuration to the report, which stores it in every checkpoint."""
        self._dump_config()
        report = next(c for c in self.trainer.callbacks if isinstance(c, Report))
        report.configuration = self.config_dump


@contextmanager
def frozen_objects() -> Iterator[None]:
    """Leave the objects that exist now out of garbage collections, unless the caller has done so with its own.

    A million objects exist until the end; each full collection would take a third of a second.
    """
    own = gc.get_freeze_count() == 0
    if own:
        gc.freeze()
    try:
        yield
    finally:
        if own:
            gc.unfreeze()


def as_list(value: Any) -> list[Any]:
    """Convert a YAML value that is None, one item or a list to a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def run_name(arguments: list[str]) -> str:
    """Name a run after its last configuration file."""
    files = config_files(arguments)
    return Path(files[-1]).stem if files else "run"


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and the exceptions that it was raised from or during."""
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__ or following.__context__


def raised_by_lightning(error: BaseException) -> bool:
    """Return whether an error comes from Lightning's code, such as those about settings."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("lightning.")


def refused_by_trainer(error: Exception, trainer: Trainer | None = None) -> OwlError:
    """Wrap Lightning's error about a configuration."""
    reason, advice = " ".join(str(error).split()), "correct its settings"
    if trainer is not None and trainer.overfit_batches > 0:
        advice += ", of which overfit_batches sets limit_train_batches and limit_val_batches"
    return OwlError("trainer.refused", f"the trainer rejects this configuration ({reason}); {advice}")


def raised_in(error: BaseException, code: CodeType) -> bool:
    """Return whether an error was raised while the code of a function ran."""
    return any(frame.f_code is code for frame, _ in traceback.walk_tb(error.__traceback__))


def differing_weights(stored: dict[str, Any], network: nn.Module) -> list[str]:
    """Describe the weights that a strict load of a state dict into a network refuses: absent ones and other shapes."""
    found = completed(network, stored)
    with whole_state_dicts():
        expected = network.state_dict()
    shapes = [{name: list(getattr(value, "shape", ())) for name, value in side.items()} for side in (found, expected)]
    return [
        *(f"missing {name}" for name in expected if name not in found),
        *(f"unexpected {name}" for name in found if name not in expected),
        *(
            f"size mismatch for {name}: {shapes[0][name]} in the checkpoint, {shape} in the configured network"
            for name, shape in shapes[1].items()
            if shapes[0].get(name, shape) != shape
        ),
    ]


def is_main_process() -> bool:
    """Return whether this is rank 0; ranks launched later must not mistake its files for those of an older run."""
    return all(os.environ.get(variable, "0") == "0" for variable in ("LOCAL_RANK", "SLURM_PROCID", "RANK"))


def silence_chatter() -> None:
    """Suppress library messages that are meant for developers; relevant warnings are shown."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    for message in CHATTER:
        warnings.filterwarnings("ignore", message=message)


def main(arguments: list[str]) -> int:
    """Run a trainer command with ``sys.argv`` as its arguments.

    Returns:
        The exit status: 0, or after a signal and a saved checkpoint 143 (SIGTERM), 138 (SIGUSR1) or 130 (Ctrl-C).

    Raises:
        OwlError: The configuration has a wrong key, type, class or file.
    """
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    set_dumper("yaml", dump)
    silence_chatter()
    cli = OwlCLI.__new__(OwlCLI)  # created first, so that its parser is available for suggestions when parsing fails
    try:
        cli.__init__(  # type: ignore[misc]
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={"parser_mode": "omegaconf+"},
            trainer_class=OwlTrainer,
            save_config_callback=SaveConfig,
            save_config_kwargs={},
            seed_everything_default=0,
        )
    except (ArgumentError, OmegaConfBaseException) as error:
        raise explain(error, arguments[1:], cli._subcommand_parsers[arguments[0]]) from error
    except SIGTERMException:
        # Only the process started by the user prints this: Lightning kills all others when a launched one fails.
        checkpoint = next(c for c in cli.trainer.callbacks if isinstance(c, Checkpoint))
        if not is_main_process():
            return 0
        last, step = checkpoint.folder(cli.trainer) / "last.ckpt", cli.trainer.global_step
        print(f"Stopped after step {step}, saved {last}; resume with the same command and --ckpt_path last")
        return checkpoint.exit_status
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):  # Lightning converts it to a silent exit(1)
            raise KeyboardInterrupt from exit_
        raise
    except MisconfigurationException as error:
        raise refused_by_trainer(error, getattr(cli, "trainer", None)) from error
    except ValueError as error:
        found = next(
            (e for e in causes(error) if isinstance(e, OwlError)), None
        )  # jsonargparse wraps constructors' errors
        if found is None and raised_by_lightning(error):
            found = refused_by_trainer(error)
        raise found or error from error
    except RuntimeError as error:
        if failure := worker_failure(error):
            raise failure from error
        path = cli.config_init[cli.subcommand].ckpt_path if hasattr(cli, "model") else None
        if path is not None and raised_in(error, nn.Module.load_state_dict.__code__):
            content = load_checkpoint(path)
            if differences := differing_weights(content["state_dict"], cli.model):
                raise other_network(path, content, cli.model, differences) from error
        raise
    return 0


def run_silently(arguments: list[str]) -> None:
    """Run a trainer command within this process, without its output."""
    before, sys.argv = sys.argv, ["owl", *arguments]  # where the command and the processes that it starts read them
    try:
        with redirect_stdout(io.StringIO()):
            main(arguments)
    finally:
        sys.argv = before
