"""Batches are a pure function of (seed, epoch, batch): over workers, ranks and interruptions."""

from itertools import pairwise

import psutil
import pytest
import torch

from owl.data.loader import GlobalBatches, ResumableLoader, evaluation_loader
from owl.data.windows import WindowDataset
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset

Content = tuple[list[int], bytes]


STATE = {"epoch": 0, "batch": 0, "global_batch": 5, "seed": 0, "shuffle_block": None}


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> WindowDataset:
    root = make_dataset(tmp_path_factory.mktemp("loader") / "data", episodes=8, frames=9, modalities=("rgb",))
    return WindowDataset(root, length=2, flip=0.5, crop=(16, 32))  # 6 episodes, 48 windows


def make_loader(windows: WindowDataset, batch_size: int = 5, workers: int = 0, **options: int) -> ResumableLoader:
    return ResumableLoader(windows, GlobalBatches(windows, batch_size, **options), workers)


def content(batch: dict[str, torch.Tensor]) -> Content:
    return batch["window"].tolist(), batch["rgb"].numpy().tobytes()


def test_an_epoch_holds_each_window_once_and_epochs_differ(windows: WindowDataset) -> None:
    loader = make_loader(windows, 4)
    epochs = [[content(batch) for batch in loader] for _ in range(2)]
    for epoch in epochs:
        assert len(epoch) == len(loader) == 12
        assert sorted(window for numbers, _ in epoch for window in numbers) == list(range(48))
    assert epochs[0] != epochs[1]
    assert [content(batch) for batch in make_loader(windows, 4)] == epochs[0]
    assert [content(batch) for batch in make_loader(windows, 4, seed=1)] != epochs[0]


def test_the_incomplete_last_batch_is_dropped(windows: WindowDataset) -> None:
    assert [len(batch["window"]) for batch in make_loader(windows, 5)] == [5] * 9


@pytest.mark.parametrize("workers", [0, 2])
def test_it_continues_exactly_where_its_consumer_was(windows: WindowDataset, workers: int) -> None:
    reference = make_loader(windows)
    expected = [content(batch) for _ in range(3) for batch in reference]
    first = make_loader(windows, workers=workers)
    taken, states = [], [first.state_dict()]
    for batch in first:  # workers are up to four batches ahead of this loop
        taken.append(content(batch))
        states.append(first.state_dict())
    assert taken == expected[:9]
    assert first.state_dict() == states[9] == STATE | {"epoch": 1, "batch": 0}
    for consumed in (0, 1, 4, 8, 9):
        second = make_loader(windows, workers=workers)
        second.load_state_dict(states[consumed])
        assert second.state_dict() == states[consumed]
        rest_of_the_epoch = [content(batch) for batch in second]
        assert rest_of_the_epoch == expected[consumed : 9 if consumed < 9 else 18]
        following = consumed + len(rest_of_the_epoch)
        assert [content(batch) for batch in second] == expected[following : following + 9]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iteration_that_is_given_up_starts_again(windows: WindowDataset, workers: int) -> None:
    loader = make_loader(windows, workers=workers)
    first = content(next(iter(loader)))
    assert next(content(batch) for batch in loader) == first
    loader = make_loader(windows, workers=workers)
    loader.load_state_dict(STATE | {"epoch": 2, "batch": 3})
    next(iter(loader))
    loader.sampler.set_epoch(3)  # as the trainer does when it limits an epoch's batches
    fresh = make_loader(windows)
    fresh.sampler.set_epoch(3)
    assert [content(batch) for batch in loader] == [content(batch) for batch in fresh]


def test_set_epoch_with_the_loaded_epoch_keeps_the_position(windows: WindowDataset) -> None:
    loader = make_loader(windows)
    loader.load_state_dict(STATE | {"epoch": 2, "batch": 3})
    loader.sampler.set_epoch(2)
    assert len(list(loader)) == 9 - 3


def test_two_ranks_of_four_see_what_one_rank_of_eight_sees(windows: WindowDataset) -> None:
    one = [content(batch) for batch in make_loader(windows, 8)]
    ranks = [[content(b) for b in make_loader(windows, 4, rank=rank, world_size=2)] for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == len(one) == 6
    for (numbers, pixels), (left, left_pixels), (right, right_pixels) in zip(one, *ranks, strict=True):
        assert numbers == left + right
        assert pixels == left_pixels + right_pixels  # the augmentation too
    assert not {n for numbers, _ in ranks[0] for n in numbers} & {n for numbers, _ in ranks[1] for n in numbers}


def test_the_state_is_the_same_on_every_rank(windows: WindowDataset) -> None:
    states = []
    for rank in range(2):
        loader = make_loader(windows, 4, rank=rank, world_size=2)
        iterator = iter(loader)
        next(iterator), next(iterator)
        states.append(loader.state_dict())
    assert states[0] == states[1] == STATE | {"batch": 2, "global_batch": 8}


def test_a_position_within_an_epoch_of_other_batches_is_refused(windows: WindowDataset) -> None:
    state = STATE | {"epoch": 1, "batch": 2, "global_batch": 8}
    with refused("loader.other-order", "global_batch 8", "now it is 5"):
        make_loader(windows).load_state_dict(state)
    with refused("loader.other-order", "seed 0", "now it is 3"):
        make_loader(windows, 8, seed=3).load_state_dict(state)
    with refused("loader.other-order", "shuffle_block 2", "now it is None"):
        make_loader(windows, 8).load_state_dict(state | {"shuffle_block": 2})
    loader = make_loader(windows)
    loader.load_state_dict({**state, "batch": 0})
    assert loader.state_dict()["epoch"] == 1


def test_blocks_of_shards_are_read_one_after_another(windows: WindowDataset) -> None:
    batches = GlobalBatches(windows, 4, shuffle_block=2)
    orders = [batches.order(epoch).tolist() for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(48))
        blocks = [{windows.describe(n)["shard"] for n in order[start : start + 16]} for start in (0, 16, 32)]
        assert [len(block) for block in blocks] == [2, 2, 2]
    first_blocks = {frozenset(windows.describe(n)["shard"] for n in order[:16]) for order in orders}
    assert len(first_blocks) > 1  # other shards meet in every epoch
    assert orders[0][:16] != sorted(orders[0][:16])


def test_fewer_windows_than_a_batch_is_an_error(windows: WindowDataset) -> None:
    with refused("loader.too-few-windows", "48 windows", "64 (2 x 32)", "batch_size"):
        make_loader(windows, 32, world_size=2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [None, 1, 7, 8, 9, 47, 100])
def test_evaluation_keeps_every_window_once_with_equally_many_batches(
    windows: WindowDataset, world_size: int, count: int | None
) -> None:
    if count is not None and count < world_size:
        with refused("loader.too-few-windows", "1 of the 48 windows", "'train'", f"{world_size} processes"):
            evaluation_loader(windows, count, 4, 0, 0, world_size)
        return
    loaders = [evaluation_loader(windows, count, 4, 0, rank, world_size) for rank in range(world_size)]
    found = [[batch["window"].tolist() for batch in loader] for loader in loaders]
    numbers = sorted(number for rank in found for batch in rank for number in batch)
    expected = min(count or 48, 48)
    assert len(numbers) == len(set(numbers)) == expected
    if expected > 1:
        assert (numbers[0], numbers[-1]) == (0, 47)
        gaps = {b - a for a, b in pairwise(numbers)}
        assert max(gaps) - min(gaps) <= 1
    assert len({len(rank) for rank in found}) == 1
    assert all(len(batch) <= 5 for rank in found for batch in rank)


def test_workers_use_one_thread_each(windows: WindowDataset) -> None:
    threads = list(torch.utils.data.DataLoader(_Threads(), num_workers=1, worker_init_fn=_worker_init(windows)))
    assert [tensor.tolist() for tensor in threads] == [[[1, 1]]]


def _worker_init(windows: WindowDataset):
    return make_loader(windows, workers=1).worker_init_fn


class _Threads(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        import cv2

        return torch.tensor([torch.get_num_threads(), cv2.getNumThreads()])


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_flat_over_epochs(windows: WindowDataset, workers: int) -> None:
    loader = make_loader(windows, workers=workers)
    process = psutil.Process()
    used = []
    for _ in range(13):
        for _ in loader:
            pass
        used.append(sum(p.memory_full_info().uss for p in [process, *process.children(recursive=True)]))
    assert max(used[3:]) - used[2] < 4 * 2**20, [n / 2**20 for n in used]
    files = process.num_fds()
    for _ in loader:
        pass
    assert process.num_fds() <= files + 2
