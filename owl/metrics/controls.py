"""Accuracy of controls predicted from frames."""

import torch
from torch import Tensor
from torchmetrics import Metric


class AxisAccuracy(Metric):
    """Accuracy of the direction of axes: negative, none (less than the dead zone), or positive.

    Args:
        axes: Names of the axes.
        dead_zone: In the unit of the axes.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    correct: Tensor
    directions: Tensor

    def __init__(self, axes: list[str], dead_zone: float) -> None:
        super().__init__()
        self.axes = list(axes)
        self.dead_zone = dead_zone
        self.add_state("correct", torch.zeros(len(axes)), dist_reduce_fx="sum")
        self.add_state("directions", torch.zeros(len(axes), 3), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, actual: Tensor) -> None:
        """Add frames: float[N, axes] each, in the unit of the axes."""
        read, played = self.direction(predicted), self.direction(actual)
        self.correct += (read == played).sum(0)
        self.directions += torch.stack([(played == sign).sum(0) for sign in (-1, 0, 1)], -1)

    def direction(self, axis: Tensor) -> Tensor:
        """Return -1, 0 or 1 for each value."""
        return axis.sign() * (axis.abs() >= self.dead_zone)

    def compute(self) -> dict[str, Tensor]:
        """Return scalars: ``axis_accuracy_<name>``, the fraction of frames with the correct direction;
        ``axis_chance_<name>``, the accuracy of always predicting the most frequent direction; ``axis_accuracy``, the
        mean accuracy over axes."""
        frames = self.directions.sum(-1)
        accuracy, chance = self.correct / frames, self.directions.amax(-1) / frames
        values = {f"axis_accuracy_{name}": value for name, value in zip(self.axes, accuracy, strict=True)}
        values |= {f"axis_chance_{name}": value for name, value in zip(self.axes, chance, strict=True)}
        return values | ({"axis_accuracy": accuracy.mean()} if self.axes else {})


class ButtonAccuracy(Metric):
    """Balanced accuracy of each button: mean of the accuracies on pressed and on released frames.

    Chance is one half, however rarely a button is pressed.

    Args:
        buttons: Names of the buttons.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    correct: Tensor
    frames: Tensor

    def __init__(self, buttons: list[str]) -> None:
        super().__init__()
        self.buttons = list(buttons)
        for name in ("correct", "frames"):
            self.add_state(name, torch.zeros(len(buttons), 2), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, actual: Tensor) -> None:
        """Add frames: [N, buttons] each, 1 or True where a button is down."""
        read, played = predicted.bool(), actual.bool()
        for state, occurs in enumerate((~played, played)):
            self.correct[:, state] += (occurs & (read == played)).sum(0)
            self.frames[:, state] += occurs.sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Return scalars: ``button_accuracy_<name>`` and ``button_accuracy``, their mean; buttons that were always or
        never down are excluded, since their accuracy is undefined."""
        accuracy = (self.correct / self.frames).mean(-1)  # NaN if a state does not occur
        values = {
            f"button_accuracy_{name}": value
            for name, value in zip(self.buttons, accuracy, strict=True)
            if value.isfinite()
        }
        return values | ({"button_accuracy": accuracy.nanmean()} if values else {})
