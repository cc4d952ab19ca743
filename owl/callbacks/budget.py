"""Convert a time limit to a number of steps, so that the learning rate's decay is complete when time runs out."""

import math
from bisect import bisect_right
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from owl.callbacks.checkpoint import Checkpoint
from owl.distributed.agreement import from_first, host_group
from owl.optim.schedule import WarmupCosine

SKIPPED = 2  # steps after each start that are not representative: they compile, fill caches and queues
MEASURED = 3  # minimum number of steps for a plan,
WAIT = 60.0  # minimum seconds since the start,
WAIT_SHARE = 0.05  # or this share of the time limit if that is less;
LATE = 0.2  # after this share one step is enough
REMEMBERED = 50  # steps over which the speed is averaged
REVISIONS = 20  # the plan is checked again after one of this many parts of the remaining steps
CLEAR_MARGIN = 0.1  # by which the remaining steps must exceed the time before a plan is made,
TOLERANCE = 0.05  # by which a plan may be too long before it is changed
WORTH_CHANGING = 0.01  # additional steps, relative to the plan
WORTH_PRINTING = 0.1  # change of the plan after which it is printed again
VALIDATION = 0.5  # duration of a batch relative to training, until one was measured,
VALIDATION_SHARE = 0.2  # but at most this share of the time limit
MARGIN = 0.1  # of the last validation's duration

say = rank_zero_only(print)


class Budget(Callback):
    """Plan how many steps fit into the time limit, and end training and the decay of the learning rate at the last one.

    The limit is ``trainer.max_time``, or the duration of a Timer among the callbacks, and covers all of training: its
    validations, checkpoints, and the time before an interruption. The callback does nothing without a limit, or while
    the trainer's limits on steps and epochs are clearly reached first. Otherwise it plans the number of steps from
    their speed, excluding the first ones, and from the remaining validations and checkpoints. The plan is revised
    during training and followed by every `owl.optim.schedule.WarmupCosine`: on a slower machine the decay ends earlier,
    on a faster one more steps are made, and the learning rate never rises.

    All ranks follow the plan of rank 0, which is broadcast at every revision.

    Every checkpoint stores, under ``budget``, the changes of the plan, the measured speed and the limits. A run that is
    resumed with the same limits continues its plan; with other limits the plan is made from scratch.

    Args:
        plan: Changes of a plan to replay instead of planning, as ``python -m owl rerun`` does: for each, the step after
            which it was made and the last step that it planned.
    """

    def __init__(self, plan: list[tuple[int, int]] | None = None) -> None:
        self.given = [(step, last) for step, last in plan or []]
        self.changes: list[tuple[int, int]] = []
        self.pace = 0.0  # seconds per step
        self.measured = 0  # steps, up to REMEMBERED
        self.validation: float | None = None  # seconds of the latest one and of the checkpoint before it
        self.saving = 0.0  # seconds of the latest checkpoint
        self._limits: list[Any] = []
        self._stored_limits: list[Any] | None = None
        self._timer: Timer | None = None
        self._printed: int | None = None
        self._validated = self._saved = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the plan of the interrupted run; do not train if it is complete."""
        stored = checkpoint.get("budget")
        if stored is None or trainer.state.fn != "fit":
            return
        self.pace, self.measured = stored["pace"], stored["measured"]
        self.validation, self.saving = stored["validation"], stored["saving"]
        self._stored_limits = stored["limits"]
        limits = limits_of(trainer)
        if limits == stored["limits"]:
            self.changes = [(step, last) for step, last in stored["changes"]]
            if self.changes and checkpoint["global_step"] >= self.changes[-1][1]:
                trainer.should_stop = True
        # Lightning's Timer checks before sharding strategies have restored its state
        if limits[-1] is not None and stored["elapsed"] >= limits[-1]:
            trainer.should_stop = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Determine which limits apply, and continue an existing plan."""
        self._group = host_group()
        self._limits = limits_of(trainer)
        self._limit = self._limits[-1]
        self._max_steps = trainer.max_steps
        timers = [timer for timer in limited(trainer) if timer._duration == self._limit]
        self._timer = timers[0] if timers and not self.given else None
        if trainer.world_size > 1:
            for timer in limited(trainer):
                timer._interval = "epoch"  # otherwise it would broadcast at every step
        schedules = (config.scheduler for config in trainer.lr_scheduler_configs)
        self._schedules = [schedule for schedule in schedules if isinstance(schedule, WarmupCosine)]
        estimate = trainer.estimated_stepping_batches
        estimated = int(estimate) if math.isfinite(estimate) and estimate >= 0 else None
        self._end = self._schedules[0].total_steps if self._schedules else estimated
        self._last = self._end
        self._start = self._step = trainer.global_step
        self._since: float | None = None
        self._unmeasured = SKIPPED - 1  # the first one is not timed at all
        self._next = self._start + SKIPPED + 1
        for change in self.changes:
            self._follow(trainer, *change)
            self._printed = self._last
        self._repeat(trainer)
        if self._timer and self.measured and self._stored_limits not in (None, self._limits):
            self._revise(trainer, 0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attribute the time until the next step to validation."""
        self._validated = trainer.state.fn == "fit" and not trainer.sanity_checking

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the plan; attribute the time until the next step to the checkpoint."""
        self._saved = True
        checkpoint["budget"] = {
            "limits": self._limits,
            "elapsed": self._timer.time_elapsed() if self._timer else 0.0,
            "changes": [list(change) for change in self.changes],
            "pace": self.pace,
            "measured": self.measured,
            "validation": self.validation,
            "saving": self.saving,
        }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure an optimiser step, and revise the plan when due."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._repeat(trainer)
        if self._timer is None:
            return
        self._measure(self._timer.time_elapsed())
        if self._step >= self._next:
            self._revise(trainer, self._step)

    def _measure(self, now: float) -> None:
        """Assign the time since the last step to a step, and to a validation or checkpoint if there was one."""
        since, self._since = self._since, now
        validated, saved = self._validated, self._saved
        self._validated = self._saved = False
        if since is None:
            return
        if self._unmeasured:
            self._unmeasured -= 1
        elif not (validated or saved):
            self.measured = min(self.measured + 1, REMEMBERED)
            self.pace += (now - since - self.pace) / self.measured
        elif self.measured and validated:
            self.validation = max(0.0, now - since - self.pace)
        elif self.measured:
            self.saving = max(0.0, now - since - self.pace)

    def _revise(self, trainer: Trainer, since: int) -> None:
        """Change the plan if it no longer fits; ``since`` is the step from which a changed plan applies."""
        decision = self._decide(trainer) if trainer.is_global_zero else None
        decision = from_first(decision, self._group)
        assert decision is not None
        last, self._next = decision
        if last is not None and last != self._last:
            self._change(trainer, since, last)
            self._print_plan()

    def _decide(self, trainer: Trainer) -> tuple[int | None, int]:
        """Return the last step, and the step at which to check again."""
        assert self._timer is not None
        elapsed, step = self._timer.time_elapsed(), self._step
        if elapsed >= self._limit:
            return step, step + 1
        measured = self.measured >= MEASURED or (self.measured and elapsed >= LATE * self._limit)
        if not measured or elapsed < min(WAIT, WAIT_SHARE * self._limit):
            return self._last, step + max(1, (step - self._start) // 4)
        fitting = self._fitting(trainer, self._limit - elapsed)
        last = fitting if self._end is None else min(fitting, self._end)
        if self._last is not None:
            planned, possible = self._last - step, last - step
            tolerance = CLEAR_MARGIN if self._last == self._end else TOLERANCE
            worthwhile = possible > planned * (1 + tolerance) and possible - planned > WORTH_CHANGING * self._last
            if planned <= possible * (1 + tolerance) and not worthwhile:
                last = self._last
        return last, step + max(1, (last - step) // REVISIONS)

    def _fitting(self, trainer: Trainer, seconds: float) -> int:
        """Return the last step within the time limit, including the validations and checkpoints until the end."""
        step = self._step
        batches = max(1, trainer.fit_loop.total_batch_idx + 1) / max(1, step)  # per step
        every = batches_between_validations(trainer, batches / self.pace) / batches
        validation = self.validation
        if validation is None:
            counted = sum(count for count in trainer.num_val_batches if math.isfinite(count))
            validation = min(VALIDATION * counted / batches * self.pace, VALIDATION_SHARE * self._limit)
        if not trainer.enable_validation:
            validation = 0.0
        saved = next((c.every_n_steps for c in trainer.callbacks if isinstance(c, Checkpoint)), math.inf)
        # one step for the work at the end of an epoch
        left = seconds - (1 + MARGIN) * validation - self.saving - self.pace

        def needed(last: int) -> float:
            during = multiples(every, step, last) * validation + multiples(saved, step, last) * self.saving
            return (last - step) * self.pace + during

        candidates = range(step, step + max(0, int(left / self.pace)) + 1)
        return step + max(0, bisect_right(candidates, left, key=needed) - 1)

    def _change(self, trainer: Trainer, step: int, last: int) -> None:
        self.changes = [change for change in self.changes if change[0] < step] + [(step, last)]
        self._follow(trainer, step, last)

    def _follow(self, trainer: Trainer, step: int, last: int) -> None:
        """End training and the decay of learning rates after step ``last``."""
        self._last = last
        for schedule in self._schedules:
            schedule.move_end(step, last)
        # epochs end as Lightning ends them
        trainer.fit_loop.epoch_loop.max_steps = self._max_steps if last == self._end else last

    def _repeat(self, trainer: Trainer) -> None:
        """Replay the change planned for this step."""
        for step, last in self.given:
            if step == self._step and (step, last) not in self.changes:
                self._change(trainer, step, last)

    def _print_plan(self) -> None:
        """Print the plan when it is made and when it changes substantially."""
        assert self._last is not None
        whole = self._last == self._end
        if (
            self._printed is not None
            and not whole
            and abs(self._last - self._printed) <= WORTH_PRINTING * self._printed
        ):
            return
        now = "" if self._printed is None else "now "
        self._printed = self._last
        limit = duration(self._limit)
        if whole:
            say(f"budget: {now}all {self._last} steps in {limit}", flush=True)
            return
        of = "" if self._end is None else f" of {self._end}"
        last = f"{float(f'{self._last:.2g}'):.0f}"
        say(f"budget: {now}about {last}{of} steps in {limit} on this machine; the learning rate ends there", flush=True)


def limited(trainer: Trainer) -> list[Timer]:
    """Return the timers that end training: Lightning's for ``trainer.max_time``, or the user's."""
    return [c for c in trainer.callbacks if isinstance(c, Timer) and c._duration is not None]


def limits_of(trainer: Trainer) -> list[Any]:
    """Return the limits of training: steps, epochs and seconds, each None without a limit."""
    seconds = min((timer._duration for timer in limited(trainer) if timer._duration is not None), default=None)
    return [trainer.max_steps, trainer.max_epochs, seconds]


def batches_between_validations(trainer: Trainer, batches_per_second: float) -> float:
    """Return the mean number of training batches between validations; infinite if there is none before the end."""
    if not trainer.enable_validation:
        return math.inf
    if trainer._val_check_time_interval is not None:
        return trainer._val_check_time_interval * batches_per_second
    epoch, epochs = trainer.num_training_batches, trainer.check_val_every_n_epoch
    assert trainer.val_check_batch is not None
    if epochs is None:
        return trainer.val_check_batch
    return epochs * epoch / max(1, epoch // trainer.val_check_batch) if math.isfinite(epoch) else math.inf


def multiples(every: float, first: int, last: int) -> int:
    """Return how many multiples of a number are in [first, last), excluding 0."""
    return max(0, math.ceil(last / every) - math.ceil(max(1, first) / every))


def duration(seconds: float) -> str:
    """Format a time limit in the largest unit of which it is a whole number."""
    for name, size in {"hour": 3600, "minute": 60}.items():
        if seconds >= size and seconds % size == 0:
            seconds, unit = seconds / size, name
            break
    else:
        unit = "second"
    return f"{seconds:g} {unit}{'' if seconds == 1 else 's'}"
