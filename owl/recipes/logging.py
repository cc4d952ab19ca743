"""What a training step tells the loggers and the progress bar."""

from lightning.pytorch import LightningModule
from torch import Tensor


def log_losses(recipe: LightningModule, loss: Tensor, terms: dict[str, Tensor]) -> None:
    """Log ``train/loss``, which the progress bar shows, and each of its terms as ``train/<name>``.

    They are logged every ``trainer.log_every_n_steps`` steps, when they reach the loggers, and at the last one. At
    every other step Lightning would take half a millisecond for each of them, and then drop it.

    Args:
        recipe: In its ``training_step``.
        loss: A scalar.
        terms: Scalars, unweighted.
    """
    trainer = recipe._trainer  # none where a step is taken without one
    last = trainer is not None and trainer.global_step + 1 == trainer.max_steps
    if trainer is None or last or trainer._logger_connector.should_update_logs:
        recipe.log("train/loss", loss, prog_bar=True)
        recipe.log_dict({f"train/{name}": term for name, term in terms.items()})
