"""What a trial of a sweep tells its study while it trains, and when it gives up."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from owl.errors import OwlError
from owl.sweep.study import METRICS, PRUNED, SweepStudy, open_storage, pruner_of

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
        self._sweep: SweepStudy | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the study.

        Raises:
            OwlError: The storage cannot be reached or holds no such study.
        """
        if not trainer.is_global_zero:
            return
        try:
            self._sweep = SweepStudy(open_storage(self.storage), self.study)
        except KeyError as error:
            raise OwlError(
                "sweep.missing",
                f"{self.storage} holds no sweep '{self.study}'; remove the callback Pruning, which a sweep adds itself",
            ) from error

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report and ask the pruner; all processes stop together."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.validations += 1
        hopeless = trainer.strategy.broadcast(self._is_hopeless(trainer))
        if hopeless and not is_last(trainer):
            if self._sweep is not None:
                self._sweep.note(self.trial, PRUNED, self.validations)
            trainer.should_stop = True

    def _is_hopeless(self, trainer: Trainer) -> bool:
        """Report the objective and return what the pruner thinks of it.

        Raises:
            OwlError: It is a metric of validation that is not logged.
        """
        sweep = self._sweep
        if sweep is None:
            return False
        objective = sweep.objective
        if objective not in trainer.callback_metrics:
            if objective.startswith(ALWAYS_LOGGED):
                known = sorted(trainer.callback_metrics)
                sweep.note(self.trial, METRICS, known)
                raise sweep.unknown_objective(known)
            return False
        sweep.report(self.trial, self.validations, float(trainer.callback_metrics[objective]))
        return pruner_of(sweep.study).prune(sweep.study, sweep.trial(self.trial))

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
