"""A loader whose worker fails raises an error that says why; and no process waits for its batch."""

from pathlib import Path

import psutil
import pytest

from owl.data.failures import worker_failure
from owl.data.loader import GlobalBatches, ResumableLoader, evaluation_loader
from owl.data.pool import SentBatch
from owl.data.windows import WindowDataset
from owl.errors import OwlError
from tests.helpers.errors import refused
from tests.helpers.lab import fit, make_lab
from tests.helpers.processes import living
from tests.helpers.shards import make_dataset

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def windows(tmp_path: Path) -> WindowDataset:
    return WindowDataset(make_dataset(tmp_path / "data", episodes=4, frames=8, modalities=("rgb",)))


def train(windows: WindowDataset) -> ResumableLoader:
    return ResumableLoader(windows, GlobalBatches(windows, 4), 1)


@pytest.mark.parametrize("kind", ["train", "evaluation"])
def test_a_batch_that_cannot_be_sent_is_reported(
    windows: WindowDataset, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: SentBatch) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(SentBatch, "__reduce__", fail)
    loader = train(windows) if kind == "train" else evaluation_loader(windows, 4, 2, 1, 0, 1)
    with refused("loader.worker", "Too many open files", "ulimit"):
        list(loader)


@pytest.mark.parametrize("error", [OwlError("shard.damaged", "it is"), OSError(28, "No space left", "cache/0.tar")])
def test_an_error_for_the_user_comes_through_as_it_is(
    windows: WindowDataset, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(windows, "fill", fail)
    with pytest.raises(type(error)) as caught:
        list(train(windows))
    assert caught.value.args == error.args
    assert getattr(caught.value, "filename", None) == getattr(error, "filename", None)


@pytest.mark.parametrize("when", [0, 2])
def test_a_worker_that_was_killed_is_reported(tmp_path: Path, when: int) -> None:
    lab = make_lab(tmp_path)
    before = set(psutil.Process().children())  # such as the resource tracker that another test has started
    fault = ["--trainer.callbacks+=tests.helpers.faults.SignalWorkers", "--trainer.callbacks.signal=SIGKILL"]
    fault += [f"--trainer.callbacks.step={when}"]
    options = ["--data.num_workers", "1", "--trainer.max_steps", "30", "--trainer.limit_val_batches", "0"]
    with refused("loader.worker", "num_workers"):
        fit(lab, "killed", *options, *fault)
    assert not living(set(psutil.Process().children()) - before)


def test_the_cause_is_named() -> None:
    for said, advice in {
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's": "data verify",
        "DataLoader worker (pid 7) is killed by signal: Killed. ": "memory",
        "DataLoader worker (pid(s) 7) exited unexpectedly": "num_workers",
        "Too many open files. Communication with the workers is no longer possible": "ulimit",
    }.items():
        found = worker_failure(RuntimeError(said))
        assert found is not None
        assert advice in str(found).partition(";")[2]
    assert worker_failure(ConnectionResetError(104, "Connection reset by peer")) is not None
    assert worker_failure(FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0.")) is None
    assert worker_failure(RuntimeError("CUDA error")) is None
    assert worker_failure(ValueError("DataLoader worker")) is None
