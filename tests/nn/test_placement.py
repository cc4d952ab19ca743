"""A network's place is found whatever its weights are."""

import torch
from torch import nn

from owl.nn.frozen import freeze
from owl.nn.placement import placement

CPU = torch.device("cpu")


def test_weights_may_be_parameters_or_buffers() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    assert placement(network) == (CPU, torch.float64)
    assert placement(freeze(network)) == (CPU, torch.float64)
    assert placement(network.to("meta")).device == torch.device("meta")


def test_statistics_of_another_dtype_do_not_count() -> None:
    network = freeze(nn.Linear(4, 4).bfloat16())
    network.register_buffer("mean", torch.zeros(2))
    network.register_buffer("steps", torch.zeros(100, dtype=torch.int64))
    network.register_buffer("nothing", None)
    assert placement(network) == (CPU, torch.bfloat16)


def test_a_network_without_weights_is_on_the_cpu() -> None:
    assert placement(nn.Flatten()) == (CPU, torch.float32)
