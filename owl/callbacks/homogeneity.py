"""Processes that train together must choose the same types of numbers."""

from lightning.pytorch import Callback, LightningModule, Trainer

from owl.errors import OwlError
from owl.hardware import multiplies_bfloat16


class HomogeneousDevices(Callback):
    """Refuses devices of which only some multiply bfloat16 fast.

    Each process asks its own device (see `owl.hardware`), `owl.optim.MuonAdamW` at every step: weights that all
    processes keep would drift apart.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare before anything is computed.

        Raises:
            OwlError: They differ.
        """
        strategy = trainer.strategy
        fast = multiplies_bfloat16(strategy.root_device)
        if strategy.reduce_boolean_decision(fast, all=True) != strategy.reduce_boolean_decision(fast, all=False):
            raise OwlError(
                "trainer.devices",
                f"some of the {trainer.world_size} devices multiply bfloat16 fast and some do not, which gives their "
                "processes different weights; use devices of one kind (CPUs become alike with "
                "ONEDNN_MAX_CPU_ISA=AVX2 in the environment of all processes and --trainer.precision 32-true)",
            )
