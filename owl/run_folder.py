"""Run folders: exclusive access for one process, and no changes before training starts."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import SoftFileLease, Timeout
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from owl.atomic import atomic_write
from owl.errors import OwlError

CONFIG = "config.yaml"
LOGGED = ("events.out.tfevents.*", "hparams.yaml")
"""Files that TensorBoard's logger writes before the checkpoint is read."""
RUN_FILES = ("checkpoints/*.ckpt", "media/step-*", "metrics.json", "report.md", *LOGGED)
"""What ``--overwrite`` removes."""
LOCK = "run.lock"
LEASE = 180.0
"""Seconds without a heartbeat after which a process on another machine is assumed to have ended."""
SIGN_OF_LIFE = 30.0
"""Seconds between heartbeats."""
POLL = 1.0


class SaveConfig(SaveConfigCallback):
    """Write the complete resolved configuration to ``<run folder>/config.yaml``, with any logger, in fit only.

    The file is written when training starts, after the data and the checkpoint have been checked. The files of an
    overwritten run are removed at the same time.

    Args:
        earlier: Files and folders of a run that this one overwrites.
        arguments: Arguments of Lightning's callback.
    """

    def __init__(self, *arguments: Any, earlier: list[Path], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.earlier = earlier

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the earlier run, write the configuration."""
        if trainer.is_global_zero:
            remove(self.earlier)
            content = self.parser.dump(self.config, skip_none=False, skip_validation=True)  # checked when parsed
            atomic_write(Path(trainer.default_root_dir) / CONFIG, content)


def run_files(folder: Path, patterns: tuple[str, ...] = RUN_FILES) -> list[Path]:
    """Return the files that a run has written to its folder."""
    return [path for pattern in patterns for path in folder.glob(pattern)]


def remove(paths: list[Path]) -> None:
    """Remove files, and folders with their content."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def training_in(folder: Path) -> Iterator[None]:
    """Lock a run's folder during training, and remove the logs of training that never started.

    The lock is a file that identifies the process and is renewed regularly. It expires when the process ends, or, as
    seen from another machine, after `LEASE` seconds without renewal. It does not need file locks.

    Raises:
        OwlError: Another process is training in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = SoftFileLease(folder / LOCK, lease_duration=LEASE, heartbeat_interval=SIGN_OF_LIFE)
    try:
        acquire(lock, folder)
    except OSError as error:
        error.filename = error.filename or str(folder / LOCK)  # on a full disk, write() does not set the file name
        raise
    before, logged = state_of(folder / CONFIG), run_files(folder, LOGGED)
    try:
        yield
    except BaseException:
        if state_of(folder / CONFIG) == before:
            remove([path for path in run_files(folder, LOGGED) if path not in logged])
        raise
    finally:
        lock.release()


def acquire(lock: SoftFileLease, folder: Path) -> None:
    """Acquire a run's lock; if a process on another machine holds it, wait whether it is renewed.

    Raises:
        OwlError: It is renewed.
    """
    with suppress(Timeout):
        lock.acquire(timeout=0)
        return
    owner = lock.owner
    where = f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "another process"
    if owner is None or owner.hostname != this_machine():
        print(
            f"{folder} is locked by {where}; waiting up to {LEASE:.0f} s for the lock to be renewed or to expire",
            flush=True,
        )
        seen = state_of(Path(lock.lock_file))
        with suppress(Timeout):
            lock.acquire(
                timeout=LEASE + SIGN_OF_LIFE,
                poll_interval=POLL,
                cancel_check=lambda: state_of(Path(lock.lock_file)) != seen,
            )
            return
    raise OwlError("run.busy", f"{where} is training in {folder}; wait for it, stop it, or choose another --name")


def this_machine() -> str:
    """Return the name of this machine or container for locks; process numbers are valid within it."""
    with TemporaryDirectory() as scratch, SoftFileLease(Path(scratch) / LOCK) as own:
        owner = own.lock.owner if hasattr(own, "lock") else own.owner
        return owner.hostname if owner else ""


def state_of(path: Path) -> tuple[int, int] | None:
    """Return what identifies a version of a file, which changes when it is replaced or renewed; None without a file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
