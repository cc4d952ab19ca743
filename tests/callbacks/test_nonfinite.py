"""A loss that is not finite stops the run, names its samples, and reaches no checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from owl.callbacks.nonfinite import NonFiniteGuard
from tests.helpers.errors import refused
from tests.helpers.line import Line, Numbers, trainer


class Described(Numbers):
    def describe(self, window: int) -> dict[str, Any]:
        return {"episode": f"episode-{window}"}


class Data(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.train_dataset = Described(8)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_size=2)


class Breaks(Line):
    """Its loss is not finite at one batch."""

    def __init__(self, batch: int, value: float) -> None:
        super().__init__()
        self.batch, self.value = batch, value

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        return loss * self.value if index == self.batch else loss


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_samples_of_the_step_are_named(tmp_path: Path, value: float) -> None:
    line = Breaks(1, value)
    with refused("loss.non-finite", f"the loss became {value} at step 2", str(tmp_path / "nonfinite-rank0.json")):
        trainer(tmp_path, [NonFiniteGuard()], max_steps=4).fit(line, Data())
    assert len(line.draws) == 2  # on a CPU at once
    assert json.loads((tmp_path / "nonfinite-rank0.json").read_text()) == {
        "step": 2,
        "found": f"the loss became {value}",
        "windows": [2, 3],
        "samples": [{"episode": "episode-2"}, {"episode": "episode-3"}],
    }


class Skips(Breaks):
    """Leaves its first batch out, as Lightning lets it."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor | None:
        return super().training_step(batch, index) if index else None


class ByHand(Breaks):
    """Steps its optimiser itself and returns what it likes, no loss among it at its first batch."""

    def __init__(self, batch: int, value: float) -> None:
        super().__init__(batch, value)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], index: int) -> dict[str, Any]:
        loss = super().training_step(batch, index)
        self.optimizers().step()  # type: ignore[union-attr]
        return {"loss": loss, "note": "any"} if index else {"note": "any"}


@pytest.mark.parametrize("recipe", [Skips, ByHand])
def test_steps_without_a_loss_are_left_out(tmp_path: Path, recipe: type[Breaks]) -> None:
    line = recipe(-1, 1.0)
    trainer(tmp_path, [NonFiniteGuard()], max_epochs=1, max_steps=-1).fit(line, Data())
    assert line.trainer.is_last_batch
    with refused("loss.non-finite", "the loss became nan at step "):
        trainer(tmp_path, [NonFiniteGuard()], max_epochs=1, max_steps=-1).fit(recipe(2, torch.nan), Data())
    assert json.loads((tmp_path / "nonfinite-rank0.json").read_text())["windows"] == [4, 5]


def test_samples_without_a_description_are_named_by_their_numbers(tmp_path: Path) -> None:
    data = Data()
    data.train_dataset = Numbers(8)
    with refused("loss.non-finite", "the loss became nan at step 2"):
        trainer(tmp_path, [NonFiniteGuard()]).fit(Breaks(1, torch.nan), data)
    assert json.loads((tmp_path / "nonfinite-rank0.json").read_text())["windows"] == [2, 3]


def test_a_checkpoint_looks_at_every_loss_and_weight_first(tmp_path: Path) -> None:
    guard = NonFiniteGuard()
    run = trainer(tmp_path, [guard], max_steps=2)
    run.fit(Line(), Data())
    run.save_checkpoint(tmp_path / "good.ckpt", weights_only=False)
    guard._pending = [(7, torch.tensor(1.0), torch.tensor([0])), (8, torch.tensor(torch.nan), torch.tensor([5]))]
    with refused("loss.non-finite", "the loss", "step 8"):
        run.save_checkpoint(tmp_path / "bad.ckpt", weights_only=False)
    run.lightning_module.weight.data.fill_(torch.inf)
    with refused("loss.non-finite", "a weight"):
        run.save_checkpoint(tmp_path / "bad.ckpt", weights_only=False)
    assert not (tmp_path / "bad.ckpt").exists()
