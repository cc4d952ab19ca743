"""Report a trial's objective to the study during training, and prune the trial."""

from contextlib import suppress
from typing import Any

import optuna
from lightning.pytorch import Callback, LightningModule, Trainer
from optuna.exceptions import StorageInternalError

from owl.errors import OwlError
from owl.sweep.plan import make
from owl.sweep.study import IDENTITY, METRICS, PRUNED, PRUNER, open_storage, unknown_objective

ALWAYS_LOGGED = "val/"
"""Validation metrics are available after the first validation; others may be logged later or only at the end."""


class Pruning(Callback):
    """Report the sweep's objective after each validation and end training when the pruner decides to.

    ``python -m owl sweep`` adds it to every trial. The n-th validation is step n of the study, also across
    interruptions. Only rank 0 accesses the study. A trial that has just completed its last training step is reported
    but not pruned.

    Args:
        storage: Argument of `owl.sweep.study.open_storage`.
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
            OwlError: The storage cannot be opened or does not contain the study.
        """
        if not trainer.is_global_zero:
            return
        storage = open_storage(self.storage)
        try:
            study = optuna.load_study(storage=storage, study_name=self.study, sampler=optuna.samplers.RandomSampler())
        except KeyError as error:
            raise OwlError(
                "sweep.missing",
                f"{self.storage} has no sweep '{self.study}'; remove the callback Pruning, which a sweep adds itself",
            ) from error
        study.pruner = make("pruner", study.user_attrs[PRUNER])
        study_id = storage.get_study_id_from_name(self.study)
        self._trial = optuna.Trial(study, storage.get_trial_id_from_study_id_trial_number(study_id, self.trial))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the objective and prune the trial on all ranks if the pruner decides to."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.validations += 1
        prune = trainer.strategy.broadcast(self._trial is not None and self._should_prune(self._trial, trainer))
        if prune and not is_last(trainer):
            if self._trial is not None:
                self._trial.set_user_attr(PRUNED, self.validations)
            trainer.should_stop = True

    def _should_prune(self, trial: optuna.Trial, trainer: Trainer) -> bool:
        """Report the objective and return the pruner's decision; raise if a validation metric is not logged."""
        with suppress(StorageInternalError):  # database unavailable: continue training
            objective, known = trial.study.user_attrs[IDENTITY]["objective"], sorted(trainer.callback_metrics)
            if objective in known:
                trial.report(float(trainer.callback_metrics[objective]), self.validations)
                return trial.should_prune()
            if objective.startswith(ALWAYS_LOGGED):
                trial.set_user_attr(METRICS, known)
                raise unknown_objective(objective, known)
        return False

    def state_dict(self) -> dict[str, Any]:
        """Store the count of validations."""
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.validations = state_dict["validations"]


def is_last(trainer: Trainer) -> bool:
    """Return whether training ends with this validation anyway."""
    return trainer.should_stop or (
        trainer.max_epochs is not None and trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    )
