"""The folder of a run: one process trains in it at a time, and what it holds changes only once training begins."""

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
"""What TensorBoard's logger writes, from before the checkpoint is read."""
RUN_FILES = ("checkpoints/*.ckpt", "media/step-*", "metrics.json", "report.md", *LOGGED)
"""What ``--overwrite`` removes."""
LOCK = "run.lock"
LEASE = 180.0
"""Seconds without a sign of life after which a process on another machine counts as gone."""
SIGN_OF_LIFE = 30.0
"""Seconds between two renewals."""
POLL = 1.0


class SaveConfig(SaveConfigCallback):
    """Writes the whole resolved configuration to ``<run folder>/config.yaml``, whatever the logger, for fit alone.

    It does so when training begins: by then the data and the checkpoint were accepted. An earlier run's files are
    removed then as well, not before.

    Args:
        earlier: Files and folders of a run that this one overwrites.
        arguments: Of Lightning's callback.
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
            content = self.parser.dump(self.config, skip_none=False)
            atomic_write(Path(trainer.default_root_dir) / CONFIG, content)


def run_files(folder: Path, patterns: tuple[str, ...] = RUN_FILES) -> list[Path]:
    """Return what a run has written into its folder."""
    return [path for pattern in patterns for path in folder.glob(pattern)]


def remove(paths: list[Path]) -> None:
    """Remove files, and folders with what they hold."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def training_in(folder: Path) -> Iterator[None]:
    """Hold a run's folder while training in it, and leave no logs in it of training that never began.

    The lock is a file that names the process and whose time is renewed. On the same machine it ends with the process,
    however that ends; on another one after `LEASE` seconds of silence. No file system needs to support locks for it.

    Raises:
        OwlError: Another process trains in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = SoftFileLease(folder / LOCK, lease_duration=LEASE, heartbeat_interval=SIGN_OF_LIFE)
    try:
        acquire(lock, folder)
    except OSError as error:
        error.filename = error.filename or str(folder / LOCK)  # a full disk: write does not know the file's name
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
    """Take a run's lock; where a process of another machine holds it, wait to see whether that lives.

    Raises:
        OwlError: It does.
    """
    with suppress(Timeout):
        lock.acquire(timeout=0)
        return
    owner = lock.owner
    where = f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "another process"
    if owner is None or owner.hostname != this_machine():
        print(f"{folder} is held by {where}; waiting up to {LEASE:.0f} s for a sign of life from it", flush=True)
        seen = state_of(Path(lock.lock_file))
        with suppress(Timeout):
            lock.acquire(
                timeout=LEASE + SIGN_OF_LIFE,
                poll_interval=POLL,
                cancel_check=lambda: state_of(Path(lock.lock_file)) != seen,
            )
            return
    raise OwlError("run.busy", f"{where} is training in {folder}; wait for it, end it, or choose another --name")


def this_machine() -> str:
    """Return what locks call this machine or, where it is one, this container: process numbers are valid in it."""
    with TemporaryDirectory() as scratch, SoftFileLease(Path(scratch) / LOCK) as own:
        owner = own.lock.owner if hasattr(own, "lock") else own.owner
        return owner.hostname if owner else ""


def state_of(path: Path) -> tuple[int, int] | None:
    """What tells a file from the one that replaces or renews it; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
