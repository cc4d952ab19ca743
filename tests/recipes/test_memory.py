"""Memory of activations: what is counted, and what does not fit."""

import pytest
import torch
from torch import nn

from owl.recipes import memory
from owl.recipes.memory import check_rollout, free_bytes, saved_bytes
from tests.helpers.errors import refused

CPU = torch.device("cpu")


def test_activations_are_counted_once_and_weights_and_their_copies_never() -> None:
    layer = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Tanh())
    x = torch.randn(64, 256)
    assert saved_bytes(lambda: layer(x)) == 64 * 512 * 4  # the input is the same, the output of tanh is new
    assert saved_bytes(lambda: layer(x + 1)) == 64 * (256 + 512) * 4
    assert saved_bytes(lambda: torch.ones(3)) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert saved_bytes(lambda: layer(x + 1)) == 64 * (256 + 512) * 2


def test_what_does_not_fit_is_reported_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_bytes(CPU) > 2**20
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * 2**30)
    check_rollout(2**30, 3, CPU)
    with refused("rollout.memory", "4 frames", "4 GiB", "cpu has 3 GiB", "two_passes"):
        check_rollout(2**30, 4, CPU)
    with refused("rollout.memory", "1 frames", "4 GiB", "checkpoint"):
        check_rollout(2**32, 1, CPU)
