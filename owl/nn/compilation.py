"""Check whether torch.compile is available."""

import os
import shutil
import warnings


def can_compile(device: str) -> bool:
    """Return whether ``torch.compile`` can be used: for CPUs it needs a C++ compiler.

    Warns if it is missing; code then runs eagerly and more slowly.

    Args:
        device: "cpu" or another type of device.
    """
    if device != "cpu" or any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        return True
    warnings.warn(
        "no C++ compiler was found, so nothing is compiled and networks are slow; install g++ or set compile to false",
        stacklevel=2,
    )
    return False
