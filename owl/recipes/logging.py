"""Log losses to the loggers and the progress bar."""

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from owl.losses.reconstruction import weighted_sum


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


def log_means(recipe: LightningModule, means: nn.ModuleDict, weights: dict[str, float], split: str) -> None:
    """Log the mean loss of every stream as ``<split>/<name>``, and their weighted sum; reset the means.

    Args:
        recipe: Recipe, called at the end of an epoch.
        means: A `torchmetrics.MeanMetric` of each stream.
        weights: Weight of each stream.
        split: "val" or "test".
    """
    found = {name: metric.compute() for name, metric in means.items()}  # type: ignore[operator]
    for metric in means.values():
        metric.reset()  # type: ignore[operator]
    values = {f"{split}/{name}": mean for name, mean in found.items()} | {f"{split}/loss": weighted_sum(found, weights)}
    recipe.log_dict(values, sync_dist=True)  # already equal in all processes; avoids Lightning's warning
