"""How networks are spread over many GPUs, apart from what they compute (FSDP2)."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Spread weights, gradients and optimiser states over a mesh, in place, block by block.

    While one block computes, the next one's weights are gathered; none but theirs are ever whole.

    Args:
        network: With its repeated parts in ``network.blocks``. Names of weights do not change.
        mesh: One-dimensional, over the processes that share the weights.
    """
    for block in network.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
