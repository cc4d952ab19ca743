import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from owl.nn.frozen import freeze


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
    assert not list(net.parameters())
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
    assert not any(buffer.requires_grad for buffer in net.buffers())


def test_buffers_follow_the_module():
    net = freeze(network()).to(torch.float64)
    assert net(IMAGE.double()).dtype == torch.float64
    assert all(buffer.device.type == "meta" for buffer in net.to("meta").buffers())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_frozen_and_independent(duplicate):
    net = freeze(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    twin = duplicate(net)
    assert torch.equal(twin(IMAGE), net(IMAGE))
    assert twin.train() is twin  # and not the original
    assert not any(part.training for part in twin.modules())
    assert not list(twin.parameters())
    assert not twin.state_dict()
    twin[0].weight.zero_()
    assert net[0].weight.abs().sum() > 0
