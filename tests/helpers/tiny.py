"""The smallest real experiment: a tiny autoencoder on a tiny dataset, through the real command line."""

import faulthandler
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer

from owl.__main__ import run
from tests.helpers.shards import AXES, BUTTONS

REPOSITORY = Path(__file__).parent.parent.parent


def tiny_experiment(dataset: Path, **trainer: Any) -> dict[str, Any]:
    """Return the configuration of an ImageVAE that trains in seconds (32x48 pixels, latents 4x6x4)."""
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "owl.recipes.image_vae.ImageVAE",
            "init_args": {
                "network": {
                    "class_path": "owl.models.image_autoencoder.ImageAutoencoder",
                    "init_args": {
                        "size": [32, 48],
                        "latent_size": [4, 6],
                        "latent_channels": 4,
                        "widths": [8, 16, 16],
                        "blocks": [1, 1, 1],
                    },
                },
                "weights": {"lpips": 0.0},
                "warmup_steps": 2,
            },
        },
        "data": {
            "class_path": "owl.data.datamodule.ShardDataModule",
            "init_args": {
                "path": str(dataset),
                "size": [32, 48],
                "batch_size": 4,
                "num_workers": 0,
                "validation_windows": 2,  # each costs more than a training step: its metrics are large networks
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 4,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            "enable_progress_bar": False,
            **trainer,
        },
    }


def tiny_inverse_dynamics(dataset: Path, **trainer: Any) -> dict[str, Any]:
    """Return the configuration of an InverseDynamics that trains in seconds on a dataset of tests/helpers/shards.py."""
    experiment = tiny_experiment(dataset, **trainer)
    experiment["model"] = {
        "class_path": "owl.recipes.inverse_dynamics.InverseDynamics",
        "init_args": {
            "network": {
                "class_path": "owl.models.inverse_dynamics.InverseDynamicsModel",
                "init_args": {"buttons": BUTTONS, "axes": AXES, "size": [16, 24], "width": 16, "hidden": 16},
            },
            "warmup_steps": 2,
        },
    }
    experiment["data"]["init_args"] |= {"modalities": ["rgb", "controls"], "length": 4, "size": [16, 24]}
    return experiment


def quiet_trainer(folder: str | Path, **options: Any) -> Trainer:
    """A trainer on the CPU that only trains: it writes, saves and shows nothing."""
    return Trainer(
        accelerator="cpu",
        logger=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def write_config(path: Path, configuration: dict[str, Any]) -> Path:
    """Write a configuration as YAML."""
    path.write_text(yaml.safe_dump(configuration, sort_keys=False))
    return path


def owl(*arguments: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``python -m owl`` as a user would, in ``cwd``.

    Raises:
        AssertionError: It failed although ``check`` was set, or hung; the message holds what it printed.
    """
    command = [sys.executable, "-m", "owl", *map(str, arguments)]
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}  # for the callbacks in tests/
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **pipes)
    try:
        output, errors = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the ranks that it launched, which hold the pipes open
        output, errors = process.communicate()
        raise AssertionError(f"it hung\n{output}\n{errors}") from None
    assert not check or process.returncode == 0, f"{output}\n{errors}"
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def owl_here(*arguments: str | Path, cwd: Path) -> int:
    """Run a command within this process, which saves the seconds that imports take; returns its exit status.

    Raises:
        OwlError: What ``python -m owl`` would print in one line with exit status 2.
    """
    words = [str(argument) for argument in arguments]
    path, argv = list(sys.path), sys.argv
    sys.path.insert(0, str(cwd))
    sys.argv = ["owl", *words]
    try:
        with chdir(cwd):
            return run(words)
    finally:
        sys.path[:], sys.argv = path, argv


def in_child(function: Callable[[], int]) -> int:
    """Call a function in a forked process, which it may kill; returns the exit status, -n for a death by signal n."""
    child = os.fork()
    if child == 0:
        status = 70
        faulthandler.dump_traceback_later(100, exit=True, file=sys.__stderr__)  # says where it hangs
        try:
            torch.set_num_threads(1)  # as in the loader's workers: OpenMP's threads do not survive a fork
            status = function()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)  # whatever happens, the child must not go on with the suite
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
