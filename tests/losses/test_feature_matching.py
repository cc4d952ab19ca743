"""Feature matching: equal features cost nothing, scale does not matter, every layer and network counts the same."""

import pytest
import torch
from torch import Tensor

from owl.losses.feature_matching import feature_matching
from tests.helpers.errors import refused


def features(seed: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(2, 3, n, generator=generator) + 1 for n in (7, 5)] for _ in range(3)]


def test_equal_features_cost_nothing_and_no_scale_matters() -> None:
    real, fake = features(0), features(1)
    assert float(feature_matching(real, real)) == 0
    loud = [[[100 * layer for layer in network] for network in side] for side in (fake, real)]
    assert float(feature_matching(*loud)) == pytest.approx(float(feature_matching(fake, real)), rel=2e-3)


def test_every_layer_of_every_network_has_the_same_weight() -> None:
    real = features(0)
    for network in range(3):
        for layer in range(2):
            fake = [[*layers] for layers in real]
            fake[network][layer] = 2 * real[network][layer]
            assert float(feature_matching(fake, real)) == pytest.approx(1 / 6, rel=2e-3)


def test_gradients_reach_decoded_sound_only_and_silent_layers_are_finite() -> None:
    real, fake = ([[layer.requires_grad_() for layer in network] for network in features(n)] for n in (0, 1))
    real[0][0] = torch.zeros_like(real[0][0]).requires_grad_()
    feature_matching(fake, real).backward()
    assert all(layer.grad is None for network in real for layer in network)
    assert all(layer.grad.isfinite().all() and layer.grad.any() for network in fake for layer in network)


def test_features_of_another_shape_are_refused() -> None:
    with refused("adversarial.shape", "[2, 3, 6]", "[2, 3, 7]"):
        feature_matching([[torch.zeros(2, 3, 6)]], [[torch.zeros(2, 3, 7)]])
