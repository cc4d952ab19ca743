"""Private names of PyTorch, and parts of its compiler that are experimental."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from tests.contracts.contract import contract


@contract("_foreach_lerp_", needed_by="owl/callbacks/ema.py: the average of all weights in one call")
def test_foreach_lerp() -> None:
    averages, weights = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.full((3,), 2.0)]
    torch._foreach_lerp_(averages, weights, 0.25)
    assert averages[0].tolist() == [0.25] * 2
    assert averages[1].tolist() == [0.5] * 3


@contract("_foreach_norm", needed_by="owl/callbacks/nonfinite.py: whether a weight is NaN, in one call")
def test_foreach_norm() -> None:
    norms = torch._foreach_norm([torch.tensor([3.0, 4.0]), torch.tensor([torch.nan])])
    assert norms[0] == 5
    assert norms[1].isnan()


@contract("_softmax_backward_data", needed_by="owl/nn/attention.py: the gradient of attention in chunks on CPUs")
def test_softmax_backward() -> None:
    scores = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight, received = scores.softmax(-1), torch.arange(10.0).view(2, 5)
    (expected,) = torch.autograd.grad(weight, scores, received)
    found = torch._softmax_backward_data(received, weight.detach(), -1, weight.dtype)
    torch.testing.assert_close(found, expected)


@contract("_inductor", needed_by="owl/bench/inference.py: weights of networks that are measured are constants")
def test_freezing_is_an_option_of_the_compiler() -> None:
    import torch._inductor.config

    before = torch._inductor.config.freezing
    with torch._inductor.config.patch(freezing=True):
        assert torch._inductor.config.freezing is True
    assert torch._inductor.config.freezing == before


@contract(
    *("_dynamo", "enable_aot_compile", "aot_compile", "guard_filter_fn"),
    *("save_compiled_function", "load_compiled_function"),
    needed_by="owl/rollout/compiled.py: code compiled by one process runs in another, with the weights of any network",
)
def test_compiled_functions_are_kept_in_files(tmp_path: Path) -> None:
    import torch._dynamo.config

    def run(network: nn.Module, x: Tensor) -> Tensor:
        return network(x) + 1

    networks, x = [nn.Linear(2, 2) for _ in range(2)], torch.ones(1, 2)
    unguarded: dict[str, Any] = {"guard_filter_fn": lambda entries: [False for _ in entries]}
    enabled = {"enable_aot_compile": True} if hasattr(torch._dynamo.config, "enable_aot_compile") else {}
    with torch._dynamo.config.patch(enabled), torch.no_grad():
        traced: Any = torch.compile(run, backend="eager", fullgraph=True, dynamic=False, options=unguarded)
        traced.aot_compile(((networks[0], x), {})).save_compiled_function(str(tmp_path / "run.bin"))
    with (tmp_path / "run.bin").open("rb") as file:
        compiled = torch.compiler.load_compiled_function(file)
    with torch.no_grad():
        assert all(torch.equal(compiled(network, x), run(network, x)) for network in networks)


class Calls(FlopCounterMode):
    """Notes what is counted."""

    def __init__(self, **options: Any) -> None:
        super().__init__(display=False, **options)
        self.names: list[str] = []

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        self.names.append(func_packet.__name__)
        return super()._count_flops(func_packet, out, args, kwargs)


@contract("_count_flops", needed_by="owl/bench/roofline.py: each operator of a step is counted with its operands")
def test_a_counter_of_operators_gets_each() -> None:
    with Calls() as calls:
        torch.ones(2, 3) @ torch.ones(3, 4)
    assert "mm" in calls.names
    assert calls.get_total_flops() == 2 * 2 * 3 * 4
    assert torch.ops.aten.mm in calls.flop_registry


@contract(
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"),
    needed_by="owl/bench/roofline.py: the operations of attention on CPUs",
)
def test_attention_on_cpus_is_one_operator_each_way() -> None:
    given: dict[str, tuple[Any, ...]] = {}

    def note(name: str) -> Any:
        return lambda *args, out_val=None, **kwargs: given.update({name: args}) or 1

    names = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")
    mapping = {getattr(torch.ops.aten, name): note(name) for name in names}
    query, key, value = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False, custom_mapping=mapping):
        F.scaled_dot_product_attention(query, key, value).sum().backward()
    assert tuple(given[names[0]][:3]) == ((1, 1, 4, 8),) * 3  # shapes of query, key and value
    assert tuple(given[names[1]][:4]) == ((1, 1, 4, 8),) * 4  # and before them that of the gradient


@contract("_python_dispatch", needed_by="owl/nn/attention.py: FlexAttention makes way for counters of operators")
def test_a_counter_of_operators_is_seen() -> None:
    from torch.utils._python_dispatch import is_in_torch_dispatch_mode

    assert not is_in_torch_dispatch_mode()
    with FlopCounterMode(display=False):
        assert is_in_torch_dispatch_mode()


@contract("_pytree", needed_by="owl/callbacks/throughput.py: the number of samples in a batch of any kind")
def test_leaves_of_a_batch() -> None:
    from torch.utils._pytree import tree_leaves

    assert tree_leaves({"a": [1, (2,)], "b": {"c": 3}}) == [1, 2, 3]


@contract("_compiled_call_impl", needed_by="owl/bench/training.py: whether a network was compiled")
def test_a_module_knows_that_it_is_compiled() -> None:
    network = nn.Linear(1, 1)
    assert network._compiled_call_impl is None
    network.compile()  # nothing is traced before the first call
    assert network._compiled_call_impl is not None


@contract("_buffers", needed_by="owl/models/world_model.py: statistics stay in float32 whatever the network becomes")
def test_a_module_keeps_its_buffers_in_a_dictionary() -> None:
    network = nn.BatchNorm1d(1)
    assert dict(network.named_buffers()) == network._buffers
    network._buffers["running_mean"] = torch.full((1,), 7.0)
    assert network.running_mean.item() == 7


@contract("_apply", needed_by="owl/models/world_model.py: statistics stay in float32 whatever the network becomes")
def test_moving_a_module_goes_through_one_method() -> None:
    class Network(nn.Linear):
        applied = 0

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            self.applied += 1
            return super()._apply(fn, recurse)

    network = nn.Sequential(Network(1, 1))
    network.to(torch.float64)
    network.bfloat16()
    assert network[0].applied == 2
    assert network[0].weight.dtype == torch.bfloat16


@contract("adamw", needed_by="owl/optim: AdamW's step for the weights that Muon leaves alone")
def test_adamw_as_a_function() -> None:
    from torch.optim.adamw import adamw

    weight, expected = torch.ones(3), nn.Parameter(torch.ones(3))
    gradient = torch.tensor([0.1, -2.0, 0.0])
    options = {"lr": 0.1, "weight_decay": 0.5, "eps": 1e-8}
    state: list[list[Tensor]] = [[torch.zeros(3)], [torch.zeros(3)], [], [torch.zeros(())]]
    optimizer = torch.optim.AdamW([expected], betas=(0.9, 0.95), **options)
    expected.grad = gradient.clone()
    for _ in range(2):
        optimizer.step()
        switches = {"foreach": True, "amsgrad": False, "maximize": False}
        adamw([weight], [gradient], *state, **switches, beta1=0.9, beta2=0.95, **options)
    torch.testing.assert_close(weight, expected.detach())


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@contract(
    "_local_tensor",
    needed_by="owl/bench/roofline.py: the bytes that one process touches; owl/precision/fp8.py: scales of its weights",
)
def test_a_spread_tensor_holds_what_lies_here(one_process: None) -> None:
    local = torch.arange(3.0)
    assert DTensor.from_local(local, init_device_mesh("cpu", (1,)))._local_tensor.data_ptr() == local.data_ptr()
