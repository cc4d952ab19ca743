"""An inverse dynamics model as a reader of controls, to measure whether generated frames follow them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from owl import models
from owl.errors import OwlError
from owl.metrics.controls import AxisAccuracy, ButtonAccuracy
from owl.models.inverse_dynamics import InverseDynamicsModel
from owl.models.world_model import WorldTransformer
from owl.nn.placement import placement
from owl.pixels import to_float
from owl.rollout.loading import origin_of


@dataclass(frozen=True)
class InverseDynamicsReader:
    """An inverse dynamics model that predicts controls from pictures, to measure the action accuracy of a world model.

    Attributes:
        network: The inverse dynamics model.
        dead_zone: Axis values with a smaller magnitude count as 0.
    """

    network: InverseDynamicsModel
    dead_zone: float

    @classmethod
    def load(cls, checkpoint: str, world_model: WorldTransformer, stride: int) -> "InverseDynamicsReader":
        """Load a run folder, checkpoint or export of the recipe owl.recipes.inverse_dynamics.InverseDynamics.

        Raises:
            OwlError: It contains another network, or predicts other controls or uses another stride.
        """
        checkpoint = models.find_checkpoint(checkpoint)
        network, content = models.load_with_content(checkpoint)
        if not isinstance(network, InverseDynamicsModel):
            raise OwlError(
                "network.kind",
                f"the network of {checkpoint} is {type(network).__qualname__}, which does not read controls; give a "
                "checkpoint of the recipe owl.recipes.inverse_dynamics.InverseDynamics",
            )
        for kind in ("buttons", "axes"):
            found, expected = (", ".join(getattr(n, kind)) or "none" for n in (network, world_model))
            if found != expected:
                raise OwlError(
                    "dataset.controls",
                    f"the inverse dynamics model {checkpoint} has the {kind} {found}, the world model {expected}; "
                    "train one on the footage of the world model",
                )
        origin = origin_of(checkpoint, content)
        if (found := origin.get("stride", 1)) != stride:
            raise OwlError(
                "network.stride",
                f"the inverse dynamics model {checkpoint} was trained with stride {found}, the world "
                f"model with {stride}; train one with --data.init_args.stride {stride}",
            )
        return cls(network, float(origin.get("dead_zone", 1.0)))

    @torch.no_grad()
    def read(self, pictures: Tensor, skip: int) -> tuple[Tensor, Tensor]:
        """Predict the controls of a clip.

        Args:
            pictures: uint8[T, 3, h, w].
            skip: Frames at the start that are input but not returned.

        Returns:
            float[T - skip, number of buttons], 0 or 1, and float[T - skip, number of axes] in their unit, on the CPU.
        """
        device = placement(self.network).device
        buttons, axes = self.network.label(to_float(pictures[None].to(device)))
        return buttons[0, skip:].cpu(), axes[0, skip:].cpu()

    def direction(self, axes: Tensor) -> Tensor:
        """Return -1, 0 or 1 for each value of axes."""
        return AxisAccuracy(self.network.axes, self.dead_zone).direction(axes)

    def accuracy(self, pictures: Tensor, buttons: Tensor, axes: Tensor, skip: int) -> dict[str, float]:
        """Compare the controls predicted from clips with the recorded controls.

        Args:
            pictures: uint8[B, T, 3, h, w].
            buttons: float[B, T, number of buttons].
            axes: float[B, T, number of axes].
            skip: Frames at the start that are input but not counted.

        Returns:
            The values of `AxisAccuracy` and `ButtonAccuracy`.
        """
        axis, button = AxisAccuracy(self.network.axes, self.dead_zone), ButtonAccuracy(self.network.buttons)
        for clip in range(len(pictures)):
            read_buttons, read_axes = self.read(pictures[clip], skip)
            axis.update(read_axes, axes[clip, skip:])
            button.update(read_buttons, buttons[clip, skip:])
        return {name: float(value) for name, value in (axis.compute() | button.compute()).items()}
