"""Compile the networks of a recipe with torch.compile."""

from lightning.pytorch import LightningModule
from torch import nn

from owl.nn.compilation import can_compile


def compile_for_training(recipe: LightningModule, *parts: nn.Module) -> None:
    """Compile parts of a recipe separately and in place, which keeps names in checkpoints, if a compiler is available.

    Without a trainer, nothing is compiled, since the checkpoint is not loaded for training.
    """
    if recipe._trainer is not None and can_compile(recipe.trainer.strategy.root_device.type):
        for part in parts:
            part.compile()
