import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from owl.nn.frozen import freeze, trained, whole_state_dicts


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Dropout(0.5), weight_norm(nn.Conv2d(4, 2, 1))
    )
    net[1].running_mean.add_(1.0)
    return net


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_outputs_are_those_of_eval_mode():
    reference = network().eval()(IMAGE)
    assert torch.equal(freeze(network())(IMAGE), reference)


def test_nothing_to_train_or_to_save():
    net = freeze(network())
    assert not trained(net)
    assert next(net.parameters()).shape == (4, 3, 3, 3)
    assert not net.state_dict()
    parent = nn.Sequential(net, nn.Linear(2, 2))
    assert set(parent.state_dict()) == {"1.weight", "1.bias"}


def test_train_of_a_parent_keeps_eval_mode_and_returns_the_module():
    net = freeze(network())
    parent = nn.Sequential(net, nn.Dropout())
    parent.train()
    assert parent.training
    assert not any(part.training for part in net.modules())
    assert net.train() is net


def test_gradients_reach_the_input_only():
    net = freeze(network())
    image = IMAGE.clone().requires_grad_()
    net(image).square().sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(buffer.requires_grad for buffer in net.buffers())


def test_weights_follow_the_module():
    net = freeze(network()).to(torch.float64)
    assert net(IMAGE.double()).dtype == torch.float64
    assert all(tensor.device.type == "meta" for tensor in (*net.to("meta").parameters(), *net.buffers()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_frozen_and_independent(duplicate):
    net = freeze(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    twin = duplicate(net)
    assert torch.equal(twin(IMAGE), net(IMAGE))
    assert twin.train() is twin  # and not the original
    assert not any(part.training for part in twin.modules())
    assert not trained(twin)
    assert not twin.state_dict()
    twin[0].weight.zero_()
    assert net[0].weight.abs().sum() > 0
    twin.load_state_dict({})  # completed by the twin's own weights
    assert not twin[0].weight.any()


def parent(scale: float = 1.0) -> nn.Sequential:
    net = nn.Sequential(freeze(network()), nn.Linear(2, 2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale)
    return net


def whole(net: nn.Module) -> dict[str, torch.Tensor]:
    with whole_state_dicts():
        return net.state_dict()


def test_a_state_dict_without_a_frozen_part_loads_strictly_and_leaves_it():
    net, other = parent(), parent(2.0)
    before = copy.deepcopy(whole(net))
    assert net.load_state_dict(other.state_dict(), strict=True) == ([], [])
    assert torch.equal(net[1].weight, other[1].weight)
    for name, tensor in whole(net).items():
        assert name.startswith("1.") or torch.equal(tensor, before[name])


def test_a_state_dict_with_a_frozen_part_is_loaded_and_one_with_half_of_it_refused():
    net, other = parent(), parent(2.0)
    stored = whole(other)
    assert {name.split(".")[0] for name in stored} == {"0", "1"}
    net.load_state_dict(stored, strict=True)
    assert torch.equal(net[0][0].weight, other[0][0].weight)
    assert not trained(net[0])
    del stored["0.0.weight"]
    with pytest.raises(RuntimeError, match=r"0\.0\.weight"):
        net.load_state_dict(stored, strict=True)


def test_what_is_not_frozen_must_be_in_the_state_dict():
    with pytest.raises(RuntimeError, match=r"1\.bias"):
        parent().load_state_dict({"1.weight": torch.zeros(2, 2)}, strict=True)


def test_an_unfrozen_constant_is_saved_and_not_trained():
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    assert list(trained(net)) == ["weight"]
    assert list(net.state_dict()) == ["weight", "bias"]
