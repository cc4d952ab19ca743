"""Seed every step from (seed, step, rank), so that resuming needs no stored generator state."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from owl.seeds import derived_seed, run_seed


class StepSeed(Callback):
    """Seed torch's generators before every training batch from (run seed, batches seen so far, rank).

    The random numbers of a step (posterior samples, noise levels, dropout) are then the same whether or not the run
    was interrupted before it, and differ between ranks. Checkpoints store no generator state, so a run can also be
    resumed with another number of processes.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the step."""
        batches_seen = trainer.fit_loop.epoch_loop.total_batch_idx
        seed = derived_seed(run_seed(), batches_seen, trainer.global_rank)
        torch.default_generator.manual_seed(seed)
        # torch.manual_seed would also queue a call, with its stack, for a CUDA that is never initialised, at every step
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
