"""What a step draws depends on seed, step and rank, and on nothing that came before."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything

from owl.callbacks.step_seed import StepSeed
from tests.helpers.line import Line, loader, trainer


class DrawInBetween(Callback):
    """Something else that draws random numbers, such as a validation."""

    def on_train_batch_end(self, *arguments: Any) -> None:
        torch.rand(3)


def draws(folder: Path, *callbacks: Callback, **options: Any) -> list[float]:
    line = Line()
    trainer(folder, [StepSeed(), *callbacks], **options).fit(line, loader(4))
    return line.draws


def test_steps_and_seeds_differ_and_nothing_else_matters(tmp_path: Path) -> None:
    expected = draws(tmp_path, max_steps=6)  # more than an epoch
    assert len(set(expected)) == 6
    torch.manual_seed(5)
    assert draws(tmp_path, DrawInBetween(), max_steps=6) == expected
    assert draws(tmp_path, max_steps=3, accumulate_grad_batches=2) == expected
    seed_everything(1)
    assert not set(draws(tmp_path, max_steps=6)) & set(expected)
    seed_everything(0)
    assert draws(tmp_path, max_steps=6) == expected


def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(tmp_path: Path) -> None:
    expected = draws(tmp_path, max_steps=6)
    run = trainer(tmp_path, [StepSeed()], max_steps=4)
    run.fit(Line(), loader(4))
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    resumed = Line()
    trainer(tmp_path, [StepSeed()], max_steps=6).fit(
        resumed, loader(4), ckpt_path=tmp_path / "a.ckpt", weights_only=True
    )
    assert resumed.draws == expected[4:]


def test_ranks_differ() -> None:
    def draw(rank: int, batch: int) -> float:
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=batch))
        StepSeed().on_train_batch_start(SimpleNamespace(fit_loop=loop, global_rank=rank), None, None, 0)
        return torch.rand(()).item()

    assert len({draw(rank, batch) for rank in range(3) for batch in range(3)}) == 9
    assert draw(1, 2) == draw(1, 2)
