"""Log losses to the loggers and the progress bar."""

from lightning.pytorch import LightningModule
from torch import Tensor


def log_losses(recipe: LightningModule, loss: Tensor, terms: dict[str, Tensor]) -> None:
    """Log ``train/loss``, also to the progress bar, and each of its terms as ``train/<name>``.

    They are logged every ``trainer.log_every_n_steps`` steps and at the last step. At other steps Lightning would spend
    half a millisecond on each of them and then discard it.

    Args:
        recipe: Recipe, called from its ``training_step``.
        loss: A scalar.
        terms: Scalars, unweighted.
    """
    trainer = recipe._trainer  # None for a step without a trainer
    last = trainer is not None and trainer.global_step + 1 == trainer.max_steps
    if trainer is None or last or trainer._logger_connector.should_update_logs:
        recipe.log("train/loss", loss, prog_bar=True)
        recipe.log_dict({f"train/{name}": term for name, term in terms.items()})
