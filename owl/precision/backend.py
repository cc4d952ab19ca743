"""Import torchao, which takes two seconds, only where float8 is used."""

import importlib
import importlib.util
import logging
from typing import Any

from owl.errors import OwlError


def require() -> None:
    """Check that torchao is installed.

    Raises:
        OwlError: It is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise OwlError(
            "fp8.package", "float8 needs torchao, which is not installed; run pip install 'owl-platform[fp8]'"
        )


def load(module: str) -> Any:
    """Import a module of torchao, without warnings that are meant for its developers.

    Raises:
        OwlError: torchao is not installed.
    """
    require()
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module(module)
    finally:
        logger.setLevel(level)
