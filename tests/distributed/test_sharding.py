"""A network spread over two processes computes and learns what a whole one does."""

import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from owl.callbacks.ema import EMA
from owl.distributed.sharding import gathered, shard, trainable
from owl.models.streams import Stream
from owl.models.world_model import Controls, WorldTransformer
from owl.nn.frozen import freeze, whole_state_dicts


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
    return WorldTransformer(streams={"video": Stream((2, 4, 4), patch=2)}, width=32, depth=2, heads=2)


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


def saving(rank: int, folder: str) -> None:
    """Save with an average, amid validation and not; note what this process held whole."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    recipe = LightningModule()
    recipe.network = build()
    whole = {name: p.detach().clone() for name, p in recipe.named_parameters()}
    shard(recipe.network, init_device_mesh("cpu", (2,)))
    ema = EMA()
    ema.average = {name: weight * 3 for name, weight in trainable(recipe).items()}
    found: list[weakref.ref[Tensor]] = []
    most = 0
    gather = DTensor.full_tensor

    def watched(tensor: DTensor) -> Tensor:
        nonlocal most
        full = gather(tensor)
        found.append(weakref.ref(full))
        most = max(most, sum(reference() is not None for reference in found))
        return full

    for validating in (False, True):
        if validating:
            ema._exchange(recipe)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        content: dict[str, Any] = {"state_dict": get_model_state_dict(recipe, options=options)}
        DTensor.full_tensor = watched
        ema.on_save_checkpoint(None, recipe, content)
        DTensor.full_tensor = gather
        assert len(found) == len(whole) * (1 + validating)
        if rank == 0:
            for name, weight in whole.items():
                torch.testing.assert_close(content["ema"]["raw"][name], weight)
                torch.testing.assert_close(content["state_dict"][name], 3 * weight)
        else:
            assert not content["ema"]["raw"]
            assert not content["state_dict"]
            assert most == 1, f"{most} weights were whole at once"
    dist.destroy_process_group()


class Inner(nn.Module):
    """A part that is called by a method, like the autoencoder of a library."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def encode(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def encode(self, x: Tensor) -> Tensor:
        return self.inner.encode(x)


def gathering(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    network = build()
    freeze(network.blocks[0])
    shard(network, init_device_mesh("cpu", (2,)))
    copy = gathered(network)
    if rank == 0:
        with whole_state_dicts():
            found = copy.state_dict()
        for name, expected in build().state_dict().items():
            assert torch.equal(found[name], expected), name
    torch.manual_seed(0)
    outer, x = Outer(), torch.ones(2, 4)
    alone = outer.encode(x)
    shard(outer, init_device_mesh("cpu", (2,)))
    assert torch.equal(outer.encode(x), alone)
    dist.destroy_process_group()


def test_a_copy_of_a_spread_network_holds_its_frozen_part_and_parts_are_called_by_their_methods(tmp_path: Path) -> None:
    mp.start_processes(gathering, (str(tmp_path),), nprocs=2, start_method="forkserver")


def test_an_average_is_saved_by_one_process_and_held_whole_by_none_else(tmp_path: Path) -> None:
    mp.start_processes(saving, (str(tmp_path),), nprocs=2, start_method="forkserver")


def test_two_shards_equal_one_whole(tmp_path: Path) -> None:
    mp.start_processes(process, (str(tmp_path),), nprocs=2, start_method="forkserver")
    whole = learn(build(), 0, 1)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for expected, *found in zip(whole, *halves, strict=True):
        torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=1e-4)
    assert not torch.equal(whole[0], whole[2])
