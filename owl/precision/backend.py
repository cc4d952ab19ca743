"""torchao is imported here alone, and only where float8 was asked for: it takes two seconds."""

import importlib
import importlib.util
import logging
from typing import Any

from owl.errors import OwlError


def require() -> None:
    """Refuse to go on without torchao.

    Raises:
        OwlError: It is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise OwlError("fp8.package", "float8 needs torchao, which is not installed; pip install 'owl-platform[fp8]'")


def load(module: str) -> Any:
    """Import one of its modules, without what that makes torch say to torchao's developers.

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
