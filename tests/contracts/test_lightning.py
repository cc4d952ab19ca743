"""Private names of Lightning, and parts of its loops that are not documented."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tests.contracts.contract import contract

Look = Callable[[Trainer, LightningModule], None]


def train(look: Look, begin: Look | None = None, callbacks: tuple[Callback, ...] = (), **options: Any) -> Trainer:
    """Train two steps, and look at the trainer after each of them."""

    class Looking(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if begin is not None:
                begin(trainer, pl_module)

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            look(trainer, pl_module)

    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    quiet |= {"enable_progress_bar": False, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0}
    steps: dict[str, Any] = {"max_steps": 2, "limit_train_batches": 2, "limit_val_batches": 1}
    trainer = Trainer(**quiet | steps | options, callbacks=[Looking(), *callbacks])
    trainer.fit(BoringModel())
    return trainer


@contract("_duration", "_interval", needed_by="owl/callbacks/budget.py: the time limit of a run")
def test_a_timer_has_a_duration_and_an_interval() -> None:
    timer, trainer = Timer(timedelta(seconds=5)), Trainer(accelerator="cpu", logger=False)
    assert timer._duration == 5
    assert Timer(None)._duration is None
    timer._duration = 0  # which is over at once
    timer._interval = "epoch"
    timer.on_train_batch_end(trainer)
    assert not trainer.should_stop
    timer._interval = "step"
    timer.on_train_batch_end(trainer)
    assert trainer.should_stop


@contract("_val_check_time_interval", needed_by="owl/callbacks/budget.py: validations after a time")
def test_a_trainer_knows_the_time_between_validations() -> None:
    assert Trainer(accelerator="cpu", logger=False)._val_check_time_interval is None
    trainer = Trainer(accelerator="cpu", logger=False, val_check_interval=timedelta(seconds=3))
    assert trainer._val_check_time_interval == 3


@contract("_can_stop_early", needed_by="owl/callbacks/checkpoint.py: the last step of a training")
def test_a_loop_knows_whether_it_may_stop() -> None:
    found = []
    train(lambda trainer, _: found.append(trainer.fit_loop._can_stop_early), min_steps=2, min_epochs=0)
    assert found == [False, True]


@contract(
    *("_should_check_val_fx", "_data_fetcher"),
    needed_by="owl/callbacks/checkpoint.py: a checkpoint is written before a validation, which a resumed run repeats",
)
def test_a_loop_knows_whether_a_validation_follows() -> None:
    found = []

    def look(trainer: Trainer, model: LightningModule) -> None:
        loop = trainer.fit_loop
        found.append(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))

    train(look, max_steps=-1, max_epochs=1)
    assert found == [False, True]


@contract(
    *("fit_loop", "epoch_loop", "max_steps"),
    needed_by="owl/callbacks/budget.py and owl/bench/training.py: the last step is found out during training",
)
@pytest.mark.parametrize("last", [1, 3])
def test_the_last_step_can_be_changed_during_training(last: int) -> None:
    steps = []

    def look(trainer: Trainer, model: LightningModule) -> None:
        steps.append(trainer.global_step)
        trainer.fit_loop.epoch_loop.max_steps = last
        assert trainer.max_steps == last

    train(look, max_steps=2, limit_train_batches=9)
    assert steps == [*range(1, last + 1)]


class Counting(Callback):
    """Notes the number of each batch, counted from the start of training and of the epoch."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int, int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        loop = trainer.fit_loop
        self.found.append((loop.epoch_loop.total_batch_idx, loop.total_batch_idx, loop.batch_idx))


@contract(
    *("total_batch_idx", "batch_idx"),
    needed_by="owl/callbacks/step_seed.py: the seed of a batch; owl/callbacks/budget.py: batches per step; "
    "owl/optim/stepping.py: the last batch of an accumulation",
)
def test_batches_are_counted_from_the_start_of_training_and_of_the_epoch() -> None:
    counting = Counting()
    train(lambda trainer, model: None, callbacks=(counting,), max_steps=4)
    assert counting.found == [(0, 0, 0), (1, 1, 1), (2, 2, 0), (3, 3, 1)]


@contract("lr_scheduler_configs", needed_by="owl/optim/stepping.py and owl/callbacks/budget.py: schedules are stepped")
def test_a_trainer_knows_its_schedules() -> None:
    found = []
    train(lambda trainer, model: found.extend(trainer.lr_scheduler_configs), max_steps=1)
    assert [type(config.scheduler) for config in found] == [torch.optim.lr_scheduler.StepLR]


@contract("val_check_batch", needed_by="owl/callbacks/budget.py: the validations until the end of training")
@pytest.mark.parametrize(
    ("options", "batches"),
    [({"val_check_interval": 0.5}, 2), ({"val_check_interval": 3, "check_val_every_n_epoch": None}, 3)],
)
def test_a_trainer_knows_the_batches_between_validations(options: dict[str, Any], batches: int) -> None:
    trainer = train(lambda trainer, model: None, max_steps=1, limit_train_batches=4, **options)
    assert trainer.val_check_batch == batches


@contract("val_loop", "validating", needed_by="owl/callbacks/checkpoint.py: a resumed run makes up for a validation")
def test_a_validation_can_be_run_before_training() -> None:
    events = []

    class Validated(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            events.append("validation")

    def begin(trainer: Trainer, model: LightningModule) -> None:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

    def look(trainer: Trainer, model: LightningModule) -> None:
        assert model.training
        events.append("step")

    train(look, begin, (Validated(),))
    assert events == ["validation", "step", "step", "validation"]


@contract(
    *("manual_optimization", "optim_step_progress", "increment_ready", "increment_completed"),
    needed_by="owl/optim/stepping.py: several optimisers are one step",
)
def test_the_global_step_of_manual_optimization_is_counted_by_its_loop() -> None:
    found = []

    def look(trainer: Trainer, model: LightningModule) -> None:
        model.automatic_optimization = False
        before = trainer.global_step
        progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()
        found.append((before, trainer.global_step))
        model.automatic_optimization = True

    train(look)
    assert found == [(0, 1), (1, 2)]


@contract("_checkpoint_connector", "_get_loops_state_dict", needed_by="owl/callbacks/checkpoint.py: runs made longer")
def test_a_checkpoint_holds_the_state_of_the_loops(tmp_path: Path) -> None:
    found = []

    def look(trainer: Trainer, model: LightningModule) -> None:
        found.append(trainer._checkpoint_connector._get_loops_state_dict())
        trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
        assert torch.load(tmp_path / "a.ckpt", weights_only=True)["loops"] == found[-1]

    train(look)
    assert len(found) == 2


@contract("_signal_connector", needed_by="owl/callbacks/checkpoint.py: a signal stops training between two steps")
def test_training_stops_when_a_signal_is_reported() -> None:
    steps = []

    def look(trainer: Trainer, model: LightningModule) -> None:
        steps.append(trainer.global_step)
        trainer._signal_connector.received_sigterm = True
        assert trainer.received_sigterm

    with pytest.raises(SIGTERMException):
        train(look, max_steps=9, limit_train_batches=9)
    assert steps == [1]


@contract("_broadcast_sigterm_tensor", needed_by="owl/callbacks/checkpoint.py: no step waits for the other processes")
def test_processes_exchange_signals_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def begin(trainer: Trainer, model: LightningModule) -> None:
        loop = trainer.fit_loop.epoch_loop
        assert callable(loop._broadcast_sigterm_tensor)
        loop._broadcast_sigterm_tensor = lambda: asked.append(1)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(type(trainer), "world_size", 2)

    train(lambda trainer, model: monkeypatch.undo(), begin, max_steps=1)
    assert asked == [1]


@contract(
    *("restarting", "reset_restart_stage", "restarted_mid_epoch", "restarted_on_train_batch_end"),
    needed_by="owl/callbacks/checkpoint.py: a resumed run continues amid an epoch, and makes up for a validation",
)
def test_a_loop_knows_where_it_was_restarted() -> None:
    def look(trainer: Trainer, model: LightningModule) -> None:
        loop = trainer.fit_loop
        assert not loop.restarted_mid_epoch
        assert not loop.epoch_loop.restarted_on_train_batch_end
        assert loop.epoch_loop.val_loop.restarting is False
        loop.reset_restart_stage()

    train(look)


@contract("_logger_connector", needed_by="owl/recipes/logging.py: losses are logged when they reach the loggers")
def test_a_trainer_knows_whether_this_step_is_logged() -> None:
    class Model(BoringModel):
        logged: list[bool] = []  # noqa: RUF012

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.logged.append(self.trainer._logger_connector.should_update_logs)
            return super().training_step(batch, batch_idx)

    trainer = Trainer(max_steps=4, log_every_n_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Model())
    assert Model.logged == [False, True, False, True]


@contract("_trainer", needed_by="owl/recipes: a recipe without a trainer neither compiles nor logs")
def test_a_recipe_has_a_trainer_or_none() -> None:
    found = []
    train(lambda trainer, model: found.append(model._trainer is trainer))
    assert found == [True, True]
    assert BoringModel()._trainer is None


@contract("_accelerator_connector", needed_by="owl/data/datamodule.py: batches are not divided among devices twice")
def test_a_trainer_knows_whether_it_divides_batches() -> None:
    for divides in (True, False):
        trainer = Trainer(accelerator="cpu", logger=False, use_distributed_sampler=divides)
        assert trainer._accelerator_connector.use_distributed_sampler is divides


@contract("_ddp_kwargs", needed_by="owl/cli/lightning.py: DDP does not send constant buffers at every step")
def test_options_of_ddp_are_kept() -> None:
    assert DDPStrategy(find_unused_parameters=True)._ddp_kwargs == {"find_unused_parameters": True}


@contract("_data_parallel_size", needed_by="owl/distributed/fsdp2.py: fsdp2 spreads over all processes of all nodes")
def test_a_sharding_strategy_has_the_number_of_its_processes() -> None:
    assert ModelParallelStrategy(data_parallel_size=3)._data_parallel_size == 3


@contract("_get_train_description", "_stop_progress", needed_by="owl/callbacks/progress.py: the bar of training")
def test_a_progress_bar_is_described_and_stopped() -> None:
    class Bar(RichProgressBar):
        described = 0

        def _get_train_description(self, current_epoch: int) -> str:
            self.described += 1
            return super()._get_train_description(current_epoch)

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert self.progress is not None
            self._stop_progress()
            assert self.progress.finished or not self.progress.live.is_started

    bar = Bar()
    train(lambda trainer, model: None, callbacks=(bar,), enable_progress_bar=True)
    assert bar.described
    assert bar._get_train_description(0).startswith("Epoch 0/-2")  # of training without a number of epochs


@contract("_given_hyperparameters", needed_by="owl/recipes/arguments.py: whether the command line builds a recipe")
def test_the_command_line_hands_over_the_arguments_of_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters

    class Recipe(BoringModel):
        def __init__(self, width: int = 2) -> None:
            super().__init__()
            self.given = _given_hyperparameters.get()

    monkeypatch.setattr("sys.argv", ["owl", "--model.width=3", "--trainer.logger=false"])
    cli = LightningCLI(Recipe, run=False, seed_everything_default=False)
    assert cli.model.given == {"width": 3, "_instantiator": "lightning.pytorch.cli.instantiate_module"}
    assert Recipe().given is None


@contract("_PRECISION_INPUT", needed_by="owl/cli/lightning.py: the precisions that the command line takes, and auto")
def test_the_precisions_of_a_trainer_are_a_type() -> None:
    from lightning.pytorch.trainer.trainer import _PRECISION_INPUT

    assert {"32-true", "bf16-mixed"} <= {name for choices in get_args(_PRECISION_INPUT) for name in get_args(choices)}


@contract(
    *("_subcommand_parsers", "_prepare_subcommand_parser", "_parse_ckpt_path", "_dump_config", "_get"),
    needed_by="owl/cli/lightning.py: help, suggestions, and the configuration of a run",
)
def test_a_command_line_is_built_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class CLI(LightningCLI):
        def subcommands(self) -> dict[str, set[str]]:  # only these are built
            return {"fit": super().subcommands()["fit"]}

        def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
            assert {"description"} == kwargs.keys()
            calls.append(subcommand)
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

        def _parse_ckpt_path(self) -> None:
            assert self.config.fit.ckpt_path == "file.ckpt"
            calls.append("checkpoint")

        def instantiate_classes(self) -> None:
            assert self._get(self.config, "trainer").max_steps == 3
            self._dump_config()
            assert self.config_dump["trainer"]["max_steps"] == 3

        def _run_subcommand(self, subcommand: str) -> None:
            assert self._subcommand_parsers.keys() == self.subcommands().keys()

    arguments = ["fit", "--trainer.max_steps", "3", "--ckpt_path", "file.ckpt"]
    monkeypatch.setattr("sys.argv", ["owl", *arguments])
    CLI(BoringModel, seed_everything_default=False)
    assert calls == ["fit", "checkpoint"]
