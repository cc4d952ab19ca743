"""Batches in memory that is used again: never while somebody still holds them, and with nothing needed beside it."""

import gc
import os
from pathlib import Path

import pytest
import torch

from owl.data.loader import GlobalBatches, ResumableLoader, evaluation_loader
from owl.data.pool import SLOTS, START_METHOD, BatchPool
from owl.data.windows import WindowDataset
from tests.helpers.shards import make_dataset

pytestmark = pytest.mark.skipif(START_METHOD != "fork", reason="only forked workers inherit a pool")


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> WindowDataset:
    root = make_dataset(tmp_path_factory.mktemp("pool") / "data", episodes=8, frames=9, modalities=("rgb", "controls"))
    return WindowDataset(root, modalities=("rgb", "controls"), length=2)


def make_loader(windows: WindowDataset, workers: int = 1) -> ResumableLoader:
    return ResumableLoader(windows, GlobalBatches(windows, 4), workers)


def taken(loader: torch.utils.data.DataLoader) -> int:
    """Slots that hold a batch, of those that the loader's workers have."""
    return int(loader.dataset._pool._taken.sum())


def address(batch: dict[str, torch.Tensor]) -> int:
    return batch["rgb"].untyped_storage().data_ptr()


def test_batches_that_are_kept_are_never_filled_again(windows: WindowDataset) -> None:
    kept = list(make_loader(windows))  # more than there are slots
    assert len(kept) > SLOTS
    for batch, expected in zip(kept, make_loader(windows, 0), strict=True):
        assert batch.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(batch[name], tensor, rtol=0, atol=0)


def test_a_part_of_a_batch_keeps_all_of_it(windows: WindowDataset) -> None:
    loader = make_loader(windows)
    iterator = iter(loader)
    part = next(iterator)["buttons"][1:]
    before = part.clone()
    assert len(list(iterator)) == len(loader) - 1
    assert torch.equal(part, before)
    gc.collect()
    assert taken(loader) == 1
    del part
    assert taken(loader) == 0


def test_memory_is_used_again(windows: WindowDataset) -> None:
    loader = make_loader(windows)
    addresses = {address(batch) for _ in range(3) for batch in loader}
    assert len(addresses) <= SLOTS


def test_batches_of_an_iteration_that_is_given_up_are_free_again(windows: WindowDataset) -> None:
    loader = make_loader(windows, 2)
    for _ in range(5):
        next(iter(loader))
    assert len(list(map(len, loader))) == len(loader)
    assert taken(loader) == 0


def test_a_fork_that_releases_a_batch_frees_nothing(windows: WindowDataset) -> None:
    iterator = iter(evaluation_loader(windows, None, 4, 1, 0, 1))  # which keeps no batch itself
    batch = next(iterator)
    before = batch["rgb"].clone()
    if (child := os.fork()) == 0:
        del batch
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    for _ in iterator:
        pass
    assert torch.equal(batch["rgb"], before)


def test_evaluation_with_a_larger_last_batch(windows: WindowDataset) -> None:
    options = {"windows": 9, "batch_size": 4, "rank": 0, "world_size": 2}
    expected = list(evaluation_loader(windows, num_workers=0, **options))
    found = list(evaluation_loader(windows, num_workers=2, **options))
    assert max(len(batch["window"]) for batch in expected) == 5
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a["rgb"], b["rgb"])


def test_empty_tensors_and_alignment() -> None:
    pool = BatchPool({"buttons": ((3, 0), torch.float32), "a": ((5,), torch.uint8), "b": ((2,), torch.float32)}, 3, 1)
    tensors = pool.tensors(1, 2)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {"buttons": (2, 3, 0), "a": (2, 5), "b": (2, 2)}
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values() if tensor.numel())
    tensors["a"].fill_(7)
    assert pool.tensors(1, 3)["a"][:2].eq(7).all()
    assert pool.tensors(0, 3)["a"].eq(0).all()


def test_nothing_is_passed_through_sockets_in_a_temporary_folder(
    windows: WindowDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a socket holds 107 bytes: handing on files through one fails, in a longer folder, without a word."""
    long = tmp_path / ("t" * 131)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr("tempfile.tempdir", str(long))
    kept = list(make_loader(windows))  # those that find no slot too
    assert len(kept) == len(make_loader(windows)) > SLOTS
