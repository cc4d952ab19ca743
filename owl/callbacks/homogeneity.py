"""Check that all ranks use the same precision."""

from lightning.pytorch import Callback, LightningModule, Trainer

from owl.errors import OwlError
from owl.hardware import multiplies_bfloat16


class HomogeneousDevices(Callback):
    """Raise an error if bfloat16 is fast on only some of the devices.

    Each rank decides for its own device (see `owl.hardware`), `owl.optim.MuonAdamW` at every step: replicated weights
    would diverge.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare the devices before training.

        Raises:
            OwlError: They differ.
        """
        strategy = trainer.strategy
        fast = multiplies_bfloat16(strategy.root_device)
        if strategy.reduce_boolean_decision(fast, all=True) != strategy.reduce_boolean_decision(fast, all=False):
            raise OwlError(
                "trainer.devices",
                f"some of the {trainer.world_size} devices are fast in bfloat16 and some are not, which would make the "
                "weights of their processes diverge; use devices of one kind (for CPUs, set "
                "ONEDNN_MAX_CPU_ISA=AVX2 in the environment of all processes and --trainer.precision 32-true)",
            )
