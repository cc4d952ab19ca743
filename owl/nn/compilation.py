"""Whether torch.compile can work here."""

import os
import shutil
import warnings


def can_compile(device: str) -> bool:
    """Tell whether there is what ``torch.compile`` needs: for CPUs a C++ compiler, which a bare machine lacks.

    Warns where it is missing: everything runs then, more slowly.

    Args:
        device: "cpu" or another type of device.
    """
    if device != "cpu" or any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        return True
    warnings.warn(
        "no C++ compiler was found, so nothing is compiled and everything takes longer; install g++, or set compile to "
        "false",
        stacklevel=2,
    )
    return False
