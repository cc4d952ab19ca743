"""A logger that knows no folder of its own, as those of web services."""

from typing import Any

from lightning.pytorch.loggers import Logger


class Placeless(Logger):
    """Keeps what it is given.

    Args:
        save_dir: What `lightning.pytorch.loggers.WandbLogger` answers: None, or the working directory.
    """

    def __init__(self, save_dir: str | None = None) -> None:
        super().__init__()
        self._save_dir = save_dir

    @property
    def save_dir(self) -> str | None:
        return self._save_dir

    @property
    def name(self) -> str:
        return "placeless"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
        pass
