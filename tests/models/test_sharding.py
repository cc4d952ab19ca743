"""A network spread over two processes computes and learns what a whole one does."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from owl.models.sharding import shard
from owl.models.world_model import Controls, WorldTransformer


def learn(network: WorldTransformer, rank: int, processes: int) -> list[Tensor]:
    """Three steps on this process's share of four clips; the mean velocity of each step."""
    generator = torch.Generator().manual_seed(1)
    latent, level = torch.randn(4, 3, 2, 4, 4, generator=generator), torch.rand(4, 3, generator=generator)
    share = slice(rank * 4 // processes, (rank + 1) * 4 // processes)
    controls = Controls(torch.ones(4, 3, 5)[share], torch.ones(4, 3, 1)[share])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    seen = []
    for _ in range(3):
        velocity = network({"video": latent[share]}, level[share], controls)["video"]
        loss = (velocity - latent[share]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(velocity.detach())
    return seen


def build() -> WorldTransformer:
    torch.manual_seed(0)
    return WorldTransformer(latent=(2, 4, 4), width=32, depth=2, heads=2)


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    network = build()
    names = list(network.state_dict())
    shard(network, init_device_mesh("cpu", (2,)))
    assert list(network.state_dict()) == names
    assert all(isinstance(p, DTensor) for p in network.parameters())
    torch.save(learn(network, rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_shards_equal_one_whole(tmp_path: Path) -> None:
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    whole = learn(build(), 0, 1)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for expected, *found in zip(whole, *halves, strict=True):
        torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=1e-4)
    assert not torch.equal(whole[0], whole[2])
