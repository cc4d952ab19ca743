"""Float8 under FSDP2, two processes on gloo: gathering weights in eight bits changes nothing but the traffic."""

import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

from owl.callbacks.ema import EMA
from owl.data.datamodule import ShardDataModule
from owl.distributed.fsdp2 import FullySharded
from owl.distributed.sharding import shard
from owl.models.world_model import Controls, WorldTransformer
from owl.precision import backend
from owl.precision.fp8 import Float8Precision, convert, float8_layers
from owl.recipes.world_model import WorldModel
from tests.helpers.errors import refused
from tests.helpers.latents import TINY, draw, lively, make_latents
from tests.helpers.tiny import quiet_trainer


def learn(network: WorldTransformer, share: slice, gathered: bool) -> list[Tensor]:
    """Three steps on a part of four clips; the velocity of each step."""
    latents, level, controls = draw(network, 8, 4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    seen = []
    for _ in range(3):
        shown = Controls(controls.buttons[share], controls.axes[share])
        velocity = network({"video": latents["video"][share]}, level[share], shown)["video"]
        loss = (velocity - latents["video"][share]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if gathered:
            backend.load("torchao.float8").precompute_float8_dynamic_scale_for_fsdp(network)
        seen.append(velocity.detach())
    return seen


def build(all_gather: bool) -> WorldTransformer:
    network = lively(depth=1, global_every=0).train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.5)
    convert(network, "tensorwise", True, [], all_gather)
    return network


def join(rank: int, folder: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=2)


def steps(rank: int, folder: str) -> None:
    join(rank, folder, "steps")
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {}
    for all_gather in (False, True):
        network = build(all_gather)
        names = list(network.state_dict())
        shard(network, mesh)
        assert list(network.state_dict()) == names
        found[f"gathered {all_gather}"] = learn(network, slice(2 * rank, 2 * rank + 2), all_gather)
        weights = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        assert all(type(x) is Tensor for x in weights.values())  # what a checkpoint holds says nothing of float8
    early = lively()
    shard(early, mesh)
    with refused("fp8.sharded", "WorldTransformer", "fsdp2"):
        convert(early, "tensorwise", True, [], False)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_gathering_in_float8_changes_no_number(tmp_path: Path) -> None:
    mp.start_processes(steps, args=(str(tmp_path),), nprocs=2, start_method="fork")
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = learn(build(False), slice(0, 4), False)
    for number, expected in enumerate(whole):
        in_float8, in_float32 = (
            torch.cat([half[f"gathered {all_gather}"][number] for half in halves]) for all_gather in (True, False)
        )
        assert torch.equal(in_float8, in_float32)
        # each process scales its own activations, so rounding differs from that of one process
        assert (in_float8 - expected).norm() < 0.1 * expected.norm()
    assert not torch.equal(whole[0], whole[2])


def trainer_run(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"GROUP_RANK": "0"}
    plugin = Float8Precision(emulate=True, float8_all_gather=True)
    scales: list[list[Any]] = []
    step = plugin.optimizer_step

    def watched(*arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        scales.append([weight._precomputed_scale for weight in plugin._gathered])
        return result

    plugin.optimizer_step = watched  # type: ignore[method-assign]
    torch.manual_seed(0)
    recipe = WorldModel(WorldTransformer(**TINY))
    data = ShardDataModule(
        f"{folder}/data", ["latent", "controls"], length=8, batch_size=4, num_workers=0, validation_windows=4
    )
    trainer = quiet_trainer(
        folder,
        devices=2,
        strategy=FullySharded(),
        plugins=[plugin],
        callbacks=[EMA()],
        max_steps=3,
    )
    trainer.fit(recipe, data)
    trainer.save_checkpoint(f"{folder}/last.ckpt")
    layers = float8_layers(recipe)
    assert len(layers) == len(scales[0]) == 14
    assert len(scales) == 3
    assert all(scale is not None for step in scales for scale in step)
    assert trainer.callback_metrics["val/loss"].isfinite()  # of the average
    assert [weight._precomputed_scale for weight in plugin._gathered] == [None] * len(layers)


def test_the_trainer_converts_shards_scales_and_validates(tmp_path: Path) -> None:
    make_latents(tmp_path / "data", (20, 20, 12, 12))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.start_processes(trainer_run, (str(tmp_path), port), nprocs=2, start_method="forkserver")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    stored = {name.removeprefix("network."): x for name, x in content["state_dict"].items() if "network" in name}
    assert all(type(x) is Tensor for x in [*stored.values(), *content["ema"]["raw"].values()])
    WorldTransformer(**TINY).load_state_dict(stored)
