"""The smallest thing that a Trainer can fit: one weight, for tests of callbacks."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    """Item i is {"x": i + 1, "window": i}."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.tensor([index + 1.0]), "window": torch.tensor(index)}


class Line(LightningModule):
    """Fits ``weight * x`` towards a random number with plain SGD; writes down what it draws and validates with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.draws: list[float] = []
        self.weights: list[float] = []
        self.validated: list[float] = []
        self.fail_in_validation = False

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.draws.append(torch.rand(()).item())
        loss = (self.weight * batch["x"] - self.draws[-1]).square().mean()
        self.log("train/loss", loss)
        return loss

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.weights.append(self.weight.item())

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.validated.append(self.weight.item())
        self.log("val/weight", self.weight)
        if self.fail_in_validation:
            raise ArithmeticError("in validation")

    def media(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        picture = np.zeros((4, 6, 3), np.uint8)
        picture[..., 0] = 200
        return {"red": picture}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.01)


def trainer(folder: Path, callbacks: list[Any], **options: Any) -> Trainer:
    """A quiet Trainer on one CPU that validates only at the end of each epoch."""
    defaults = {"max_steps": 3, "logger": False, "num_sanity_val_steps": 0, "enable_progress_bar": False}
    return Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        default_root_dir=folder,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        **{**defaults, **options},
    )


def loader(count: int, batch_size: int = 1) -> DataLoader:
    """Batches of numbers, in order."""
    return DataLoader(Numbers(count), batch_size=batch_size)
