"""Randomness as a function of (seed, step, rank): resuming needs no stored generator state."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from owl.seeds import derived_seed, run_seed


class StepSeed(Callback):
    """Seeds torch's generators before every training batch from (run seed, batches seen so far, rank).

    Whatever a step draws (posterior samples, noise levels, dropout) is then the same whether or not the run was
    interrupted before it, and differs between ranks. Nothing needs to be stored in checkpoints, so a run may also
    continue on another number of processes.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the step."""
        batches_seen = trainer.fit_loop.epoch_loop.total_batch_idx
        seed = derived_seed(run_seed(), batches_seen, trainer.global_rank)
        torch.default_generator.manual_seed(seed)
        # torch.manual_seed would also note a call for a CUDA that is never started, with its stack, at every step
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
