"""Private names of efficientnet-lite-pytorch."""

from efficientnet_lite_pytorch import EfficientNet
from torch import nn

from owl.metrics.frechet import CONVOLUTIONS_WITH_NORM
from tests.contracts.contract import contract


@contract("_blocks", needed_by="owl/metrics/frechet.py: norms are folded into the convolutions before them")
def test_convolutions_stand_before_their_norms() -> None:
    network = EfficientNet.from_name("efficientnet-lite0")
    parts = [network, *network._blocks]
    for conv, norm in CONVOLUTIONS_WITH_NORM:
        found = [part for part in parts if hasattr(part, conv)]
        assert found, conv
        assert all(isinstance(getattr(part, norm), nn.BatchNorm2d) for part in found), norm
