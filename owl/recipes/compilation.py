"""Running the networks of a recipe through torch.compile."""

from lightning.pytorch import LightningModule
from torch import nn

from owl.nn.compilation import can_compile


def compile_for_training(recipe: LightningModule, *parts: nn.Module) -> None:
    """Compile parts of a recipe in place, which keeps the names in checkpoints; each by itself, where that can work.

    Nothing is compiled where there is no trainer: a checkpoint is loaded for something else then.
    """
    if recipe._trainer is not None and can_compile(recipe.trainer.strategy.root_device.type):
        for part in parts:
            part.compile()
