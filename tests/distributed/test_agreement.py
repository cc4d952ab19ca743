"""Processes agree without waiting for each other, and wait for the first one however long it takes."""

from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.distributed_c10d import _set_pg_timeout, default_pg_timeout

from owl.distributed.agreement import Agreement, from_first, host_group

BROUGHT = [(0, 0), (0, 2), (1, 0), (0, 0), (0, 0), (0, 3), (0, 0)]
"""What the two processes bring, call for call."""


def process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    agreement, group = Agreement(), host_group()
    # each call returns what the previous one gathered, and a call that returns something gathers nothing
    assert [agreement(numbers[rank]) for numbers in BROUGHT] == [0, 0, 2, 0, 0, 0, 3]
    assert [agreement(1 - rank), agreement.finish(), agreement.finish()] == [0, 1, 0]
    _set_pg_timeout(timedelta(milliseconds=1))  # of the group that everything else uses
    late = Agreement()
    assert late(rank) == 0
    assert from_first("zero" if rank == 0 else None, group) == "zero"
    if rank == 0:
        sum(range(5_000_000))  # takes longer
    assert from_first([rank], group) == [0]
    assert late.finish() == 1
    _set_pg_timeout(default_pg_timeout)
    dist.destroy_process_group()


def test_two_processes_agree_and_wait(tmp_path: Path) -> None:
    mp.start_processes(process, (str(tmp_path),), nprocs=2, start_method="forkserver")


def test_a_single_process_communicates_with_no_other() -> None:
    agreement = Agreement()
    assert [agreement(number) for number in (0, 2, 0)] == [0, 2, 0]
    assert agreement.finish() == 0
    assert from_first("mine", host_group()) == "mine"
