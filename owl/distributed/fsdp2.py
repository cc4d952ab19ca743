"""Strategy ``fsdp2``: Lightning's ModelParallelStrategy adapted to OWL's checkpoints."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

from owl.checkpoint import load_checkpoint, other_network


class FullySharded(ModelParallelStrategy):
    """Strategy ``--trainer.strategy fsdp2``: weights, gradients and optimiser states are sharded over all ranks.

    For networks that do not fit on one GPU; smaller ones train faster with ``--trainer.strategy ddp``. Each recipe
    shards its network with `owl.distributed.sharding.shard`. Checkpoints are one complete file, as with every other
    strategy: a run can be resumed with another strategy and another number of processes.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Shard over all ranks of all nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """Convert to the trainer's precision before the recipe shards its network, since float8 replaces layers."""
        self.precision_plugin.convert_module(self.lightning_module)  # type: ignore[arg-type]  # set by now
        with super().model_sharded_context():
            yield

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimiser for a checkpoint; only its settings if it was never stepped.

        PyTorch's function steps such an optimiser to initialise its state, which would change it.
        """
        return super().optimizer_state(optimizer) if optimizer.state else optimizer.state_dict()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load and shard the weights and optimiser states of a checkpoint of any strategy; return the checkpoint.

        Lightning's implementation assumes contiguous tensors and optimisers with a single parameter group. Every rank
        reads only its shards: the tensors that `owl.checkpoint.load_checkpoint` returns are memory-mapped.

        Raises:
            OwlError: See `owl.checkpoint.load_checkpoint`; or weights of the network are missing.
        """
        content = load_checkpoint(self.broadcast(checkpoint_path))
        assert self.model is not None
        strict = self.lightning_module.strict_loading  # type: ignore[union-attr]
        if strict and (missing := self.model.state_dict().keys() - content["state_dict"].keys()):
            # missing entries are completed from the model below, before PyTorch checks for them
            raise other_network(
                checkpoint_path, content, self.lightning_module, [f"missing {n}" for n in sorted(missing)]
            )
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, dict(content["state_dict"]), options=options)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, content.get("optimizer_states", []), strict=False):
            if not state["state"]:
                optimizer.load_state_dict(state)
                continue
            named: dict[str, Any] = {"state": {}, "param_groups": []}
            for group, stored in zip(optimizer.param_groups, state["param_groups"], strict=True):
                members = [names[parameter] for parameter in group["params"]]
                named["param_groups"].append(stored | {"params": members})
                for name, number in zip(members, stored["params"], strict=True):
                    if number in state["state"]:  # weights that never had a gradient have no state
                        named["state"][name] = state["state"][number]
            set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return content


if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register("fsdp2", FullySharded, description="Weights sharded over all processes")
