"""Log losses to the loggers and the progress bar, and the statistics of latents."""

from lightning.pytorch import LightningModule
from torch import Tensor

from owl.metrics.latents import LatentStatistics


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


def log_latents(recipe: LightningModule, latents: LatentStatistics, split: str, tsr: float) -> dict[str, Tensor]:
    """Log and return the statistics of all latents of a pass, and reset them.

    Args:
        recipe: Recipe, called at the end of a validation or test epoch.
        latents: The statistics.
        split: Beginning of the names in logs, such as "val".
        tsr: Tensor-size reduction, logged as well.
    """
    statistics = latents.compute()
    latents.reset()
    scalars = {f"{split}/latent_{name}": value for name, value in statistics.items() if value.ndim == 0}
    # already the same on every rank, which Lightning cannot know
    recipe.log_dict({**scalars, f"{split}/tsr": tsr}, sync_dist=True)
    return statistics
