"""Accuracy of controls against counts made by hand."""

import pytest
import torch

from owl.metrics.controls import AxisAccuracy, ButtonAccuracy


def values(metric) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def test_directions_and_the_dead_zone():
    metric = AxisAccuracy(["turn", "look"], dead_zone=1.0)
    played = torch.tensor([[-4.0, 0.0], [4.0, 0.0], [0.9, 0.0], [1.0, -3.0]])
    read = torch.tensor([[-1.5, 0.5], [-4.0, 2.0], [-0.9, 0.9], [0.99, -1.5]])  # right: yes no yes no; yes no yes yes
    metric.update(read[:1], played[:1])
    metric.update(read[1:], played[1:])
    assert values(metric) == pytest.approx(
        {
            "axis_accuracy_turn": 0.5,
            "axis_accuracy_look": 0.75,
            "axis_chance_turn": 0.5,  # 4.0 and 1.0 turn right
            "axis_chance_look": 0.75,
            "axis_accuracy": 0.625,
        }
    )


def test_always_predicting_the_most_frequent_direction_is_chance():
    metric = AxisAccuracy(["turn"], dead_zone=1.0)
    played = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)) * 2
    metric.update(torch.zeros(1000, 1), played)
    found = values(metric)
    assert (played.abs() < 1).float().mean() > 1 / 3
    assert found["axis_accuracy_turn"] == found["axis_chance_turn"] > 1 / 3


def test_buttons_are_balanced_and_undecidable_ones_left_out():
    metric = ButtonAccuracy(["rare", "never", "guessed"])
    played = torch.zeros(10, 3)
    played[0, 0] = 1
    played[:5, 2] = 1
    metric.update(torch.zeros(10, 3), played)
    # released frames are all right, pressed ones all wrong: one half, however rare
    assert values(metric) == {
        "button_accuracy_rare": 0.5,
        "button_accuracy_guessed": 0.5,
        "button_accuracy": 0.5,
    }
    metric.reset()
    read = played.clone()
    read[1, 0] = 1
    metric.update(read, played)
    assert values(metric)["button_accuracy_rare"] == pytest.approx((1 + 8 / 9) / 2)


def test_nothing_to_measure_gives_no_value():
    axes, buttons = AxisAccuracy([], 1.0), ButtonAccuracy([])
    axes.update(torch.zeros(4, 0), torch.zeros(4, 0))
    buttons.update(torch.zeros(4, 0), torch.zeros(4, 0))
    assert values(axes) == values(buttons) == {}
