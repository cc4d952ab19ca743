"""Sharding of networks with FSDP2, independent of their forward pass."""

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from owl.nn.frozen import trained, whole_state_dicts

METHODS = ("encode", "decode", "estimate", "label")
"""Names of methods that networks are called by, besides ``forward``."""


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard weights, gradients and optimiser states over a mesh, in place, part by part.

    While one part computes, the weights of the next are gathered; no other weights are ever unsharded.

    Args:
        network: Sharded by its repeated parts in ``network.blocks``, otherwise by its children. Names of weights do
            not change.
        mesh: One-dimensional, over the ranks that share the weights.
    """
    network.to(memory_format=torch.contiguous_format)  # required by FSDP2
    parts = getattr(network, "blocks", network.children())
    for part in (*(part for part in parts if next(part.parameters(), None) is not None), network):
        fully_shard(part, mesh=mesh)
        for method in METHODS:
            if hasattr(part, method):
                register_fsdp_forward_method(part, method)


def reshard(module: nn.Module) -> None:
    """Free the unsharded weights left by a pass without gradients, which are not updated with the shards."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """Return the `trained` parameters by name; of sharded ones the local shard."""
    reshard(module)
    return {name: parameter.data for name, parameter in trained(module).items()}


def gathered(network: nn.Module) -> nn.Module:
    """Return a network that one process can run alone: the network itself, or an unsharded copy of a sharded one.

    All ranks must call this. Only rank 0 gets a copy of a sharded network; the others get the sharded one.
    """
    if not isinstance(network, FSDPModule):
        return network
    with whole_state_dicts():
        weights = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not weights:
        return network
    copy: nn.Module = unsharded_class(network)(**network.config)  # type: ignore[arg-type]
    copy.load_state_dict(weights)
    return copy


def unsharded_class(network: nn.Module) -> type[nn.Module]:
    """Return the class of a network before sharding, which replaces it by a subclass."""
    kinds = type(network).__mro__
    return next(kind for kind in kinds if issubclass(kind, nn.Module) and not issubclass(kind, FSDPModule))


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of one that may be sharded; all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_first(tensor: Tensor) -> Tensor | None:
    """Return the full tensor of one that may be sharded, on rank 0 only; all ranks must call this.

    Rank 0 gets a sharded tensor on the CPU, the others None: when called for one weight after another, no device holds
    more than one unsharded weight. A tensor that is not sharded is returned unchanged.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    full = full_tensor(tensor)
    return full.cpu() if distributed.get_rank() == 0 else None


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor like another one, which may be unsharded; the inverse of `full_tensor`."""
    if not isinstance(like, DTensor):
        return tensor
    # all ranks have the same tensor: no communication is needed
    return distribute_tensor(tensor.to(like.device).contiguous(), like.device_mesh, like.placements, src_data_rank=None)
