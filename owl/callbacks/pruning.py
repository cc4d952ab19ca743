"""What a trial of a sweep tells its study while it trains, and when it gives up."""

from contextlib import suppress
from typing import Any

import optuna
from lightning.pytorch import Callback, LightningModule, Trainer
from optuna.exceptions import StorageInternalError

from owl.errors import OwlError
from owl.sweep.plan import PRUNERS, make
from owl.sweep.study import IDENTITY, METRICS, PRUNED, PRUNER, open_storage, unknown_objective

ALWAYS_LOGGED = "val/"
"""Metrics of validation are there after the first one; others may be logged later or only at the end."""


class Pruning(Callback):
    """Reports the sweep's objective after each validation and ends training when the sweep's pruner says so.

    ``python -m owl sweep`` adds it to every trial. The n-th validation is step n of the study, also over
    interruptions. Only the first process talks to the study. A trial that has just taken its last training step is
    reported but not pruned: it is complete.

    Args:
        storage: What `owl.sweep.study.open_storage` takes.
        study: Name of the sweep.
        trial: Number of the trial in the study.
    """

    def __init__(self, storage: str, study: str, trial: int) -> None:
        self.storage, self.study, self.trial = storage, study, trial
        self.validations = 0
        self._trial: optuna.Trial | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the study.

        Raises:
            OwlError: The storage cannot be reached or holds no such study.
        """
        if not trainer.is_global_zero:
            return
        storage = open_storage(self.storage)
        try:
            study = optuna.load_study(storage=storage, study_name=self.study, sampler=optuna.samplers.RandomSampler())
        except KeyError as error:
            raise OwlError(
                "sweep.missing",
                f"{self.storage} holds no sweep '{self.study}'; remove the callback Pruning, which a sweep adds itself",
            ) from error
        study.pruner = make(PRUNERS, study.user_attrs[PRUNER])
        identity = storage.get_study_id_from_name(self.study)
        self._trial = optuna.Trial(study, storage.get_trial_id_from_study_id_trial_number(identity, self.trial))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report and ask the pruner; all processes stop together."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.validations += 1
        hopeless = trainer.strategy.broadcast(self._trial is not None and self._is_hopeless(self._trial, trainer))
        if hopeless and not is_last(trainer):
            if self._trial is not None:
                self._trial.set_user_attr(PRUNED, self.validations)
            trainer.should_stop = True

    def _is_hopeless(self, trial: optuna.Trial, trainer: Trainer) -> bool:
        """Report the objective and return what the pruner thinks of it; refuse one of validation that is not logged."""
        with suppress(StorageInternalError):  # does not answer: train on
            objective, known = trial.study.user_attrs[IDENTITY]["objective"], sorted(trainer.callback_metrics)
            if objective in known:
                trial.report(float(trainer.callback_metrics[objective]), self.validations)
                return trial.should_prune()
            if objective.startswith(ALWAYS_LOGGED):
                trial.set_user_attr(METRICS, known)
                raise unknown_objective(objective, known)
        return False

    def state_dict(self) -> dict[str, Any]:
        """Keep the count across interruptions."""
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.validations = state_dict["validations"]


def is_last(trainer: Trainer) -> bool:
    """Whether training ends with this validation anyway."""
    return trainer.should_stop or (
        trainer.max_epochs is not None and trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    )


def without_pruning(configuration: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a trial as one of a run that belongs to no sweep, from what its ``config.yaml`` holds."""
    trainer = configuration.get("trainer") or {}
    kept = [c for c in trainer.get("callbacks") or [] if c.get("class_path") != "owl.callbacks.pruning.Pruning"]
    return {**configuration, "trainer": {**trainer, "callbacks": kept or None}}
