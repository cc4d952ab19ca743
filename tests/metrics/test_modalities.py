"""Errors of depth and flow against their closed forms."""

import math

import torch

from owl.metrics.modalities import DepthMetrics, FlowMetrics


def values(metrics: DepthMetrics | FlowMetrics) -> dict[str, float]:
    return {name: metric.compute().item() for name, metric in metrics.named().items()}


def test_depth_is_measured_where_it_is_known() -> None:
    true = torch.tensor([10.0, 10.0, 10.0, 10.0, 0.0]).view(1, 1, 1, 5)
    found = torch.tensor([10.0, 12.0, 15.0, 7.0, 3.0]).view(1, 1, 1, 5)
    metrics = DepthMetrics()
    metrics.update(found, true, true > 0)
    metrics.update(found, true, torch.zeros_like(true, dtype=torch.bool))  # a frame without any changes nothing
    assert math.isclose(values(metrics)["depth_abs_rel"], (0 + 0.2 + 0.5 + 0.3) / 4, rel_tol=1e-6)
    assert values(metrics)["depth_delta"] == 0.5  # 10 / 7 is beyond 1.25


def test_flow_is_compared_on_its_grid() -> None:
    true = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).repeat(1, 1, 2, 3)
    found = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1).repeat(1, 1, 4, 6)
    found[0, 1] += torch.tensor([1.0, -1.0]).repeat(3)  # averages out within a cell
    true[0, 0, 1, 2] = torch.nan
    metrics = FlowMetrics()
    metrics.update(found, true)
    assert values(metrics) == {"flow_epe": 4.0, "flow_epe_of_zero": 5.0}
