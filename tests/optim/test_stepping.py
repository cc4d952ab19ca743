"""Two optimisers: counted as one step, each network taught by its own loss alone."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from owl.callbacks.ema import EMA
from owl.optim.stepping import manual_step, only_towards
from tests.helpers.players import Players, pictures
from tests.helpers.tiny import quiet_trainer


def batches(count: int, size: int) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (count * size, 1, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return DataLoader([{"rgb": part} for part in pictures.split(size)], batch_size=None)


def trained(folder: Path, count: int, size: int, *callbacks: Any, steps: int = -1, **options: Any) -> Players:
    torch.manual_seed(0)
    players = options.pop("recipe", Players)(**options)
    trainer = quiet_trainer(folder, max_epochs=1, max_steps=steps, callbacks=list(callbacks))
    trainer.fit(players, batches(count, size))
    return players


class GradientNorms(Callback):
    """Notes the norm of each optimiser's gradients at every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(self.note)

    def note(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.seen.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))


def test_only_towards_teaches_what_made_x_and_nothing_else() -> None:
    torch.manual_seed(0)
    maker, judge = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    x = torch.randn(7, 3)
    plain = judge(maker(x)).square().mean()
    expected = torch.autograd.grad(plain, list(maker.parameters()))
    steered = only_towards(maker(x), lambda made: judge(made).square().mean())
    (2 * steered).backward()
    torch.testing.assert_close(steered, plain.detach())
    for parameter, gradient in zip(maker.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    assert all(parameter.grad is None for parameter in judge.parameters())


class Careless(Players):
    """The judge's opinion is asked for without keeping the judge from learning."""

    def generator_loss(self, real: Tensor) -> Tensor:
        fake = self.generator(real)
        true = self.discriminator(real).detach()
        return F.l1_loss(fake, real) + 0.1 * F.softplus(true - self.discriminator(fake)).mean()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_teaches_its_own_optimizer_s_weights_alone(tmp_path: Path, accumulate: int) -> None:
    careful = trained(tmp_path, 6, 2, accumulate=accumulate)
    careless = trained(tmp_path, 6, 2, accumulate=accumulate, recipe=Careless)
    for (name, a), b in zip(careful.named_parameters(), careless.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


class Noted(Players):
    """Notes which networks are stepped, and at every batch the number of the step and the learning rate."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.numbers: list[tuple[int, int]] = []
        self.stepped: list[str] = []
        self.rates: list[float] = []

    def on_fit_start(self) -> None:
        for name, optimizer in zip("gd", self.trainer.optimizers, strict=True):
            optimizer.register_step_pre_hook(lambda *_, n=name: self.stepped.append(n))

    def discriminator_loss(self, real: Tensor) -> Tensor:
        self.numbers.append((self.trainer.fit_loop.batch_idx, self.global_step))
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return super().discriminator_loss(real)


def test_each_optimizer_is_stepped_at_its_cadence(tmp_path: Path) -> None:
    noted = trained(tmp_path, 24, 2, recipe=Noted, generator_every=5, accumulate=2, final_lr=0.0)
    assert "".join(noted.stepped) == "ddddgdddddgddd"
    assert noted.numbers == [(batch, batch // 2) for batch in range(24)]
    assert noted.global_step == 12
    for schedule in noted.lr_schedulers():  # type: ignore[union-attr]
        assert schedule.total_steps == schedule.last_epoch == 12
    assert noted.rates == [rate for rate in noted.rates[::2] for _ in range(2)]
    assert noted.rates[2:] == sorted(noted.rates[2:], reverse=True)
    steps = [int(next(iter(o.state.values()))["step"]) for o in noted.trainer.optimizers[1:]]
    assert steps == [12]


def test_a_schedule_may_start_before_its_optimizer_does(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Detected call of")
        trained(tmp_path, 3, 2, generator_every=3)


def test_steps_of_two_optimizers_count_once(tmp_path: Path) -> None:
    average = EMA(0.9)
    players = trained(tmp_path, 9, 2, average, steps=6)
    assert players.trainer.global_step == average.updates == 6
    for optimizer, schedule in zip(players.trainer.optimizers, players.lr_schedulers(), strict=True):  # type: ignore[arg-type]
        assert {int(state["step"]) for state in optimizer.state.values() if "step" in state} == {6}
        assert schedule.last_epoch == 6


class Alone(Players):
    """The generator alone, which also has the only schedule."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        with manual_step(self) as step:
            step(self.optimizers(), self.generator_loss(pictures(batch)))  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.generator.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}


def test_one_optimizer_and_one_schedule_are_as_good(tmp_path: Path) -> None:
    alone = Alone()
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(alone, batches(3, 2))
    assert trainer.global_step == 3
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)


@pytest.mark.parametrize("clip", [None, 0.02])
def test_accumulation_equals_a_larger_batch(tmp_path: Path, clip: float | None) -> None:
    norms = GradientNorms(), GradientNorms()
    at_once = trained(tmp_path, 3, 4, norms[0], clip=clip)
    in_parts = trained(tmp_path, 6, 2, norms[1], clip=clip, accumulate=2)
    assert at_once.trainer.global_step == in_parts.trainer.global_step == 3
    assert norms[1].seen == pytest.approx(norms[0].seen, rel=1e-4)  # which Adam and Muon would not show
    for (name, a), b in zip(at_once.named_parameters(), in_parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_every_schedule_ends_with_the_steps_not_with_the_batches(tmp_path: Path) -> None:
    """Also where epochs rather than steps end training, and an epoch's last step is made of what is left over."""
    players = trained(tmp_path, 9, 2, accumulate=2, final_lr=0.1)
    assert players.trainer.global_step == 5
    for optimizer, schedule in zip(players.trainer.optimizers, players.lr_schedulers(), strict=True):  # type: ignore[arg-type]
        assert schedule.total_steps == schedule.last_epoch == 5
        assert [g["lr"] for g in optimizer.param_groups] == [
            pytest.approx(0.1 * g["initial_lr"]) for g in optimizer.param_groups
        ]
    assert trained(tmp_path, 9, 2, accumulate=2, steps=4).lr_schedulers()[0].total_steps == 4  # type: ignore[index, union-attr]


def test_what_an_epoch_leaves_over_makes_a_step(tmp_path: Path) -> None:
    assert trained(tmp_path, 5, 2, accumulate=2).trainer.global_step == 3


def test_each_network_is_clipped_separately(tmp_path: Path) -> None:
    norms = GradientNorms()
    trained(tmp_path, 1, 2, norms, clip=0.001)
    assert norms.seen == pytest.approx([0.001, 0.001], rel=1e-2)
