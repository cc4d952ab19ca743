"""Running networks through torch.compile, where it can work."""

import os
import shutil
import warnings

from torch import nn


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


def compile_in_place(device: str, *parts: nn.Module) -> None:
    """Run modules through ``torch.compile`` if that can work (`can_compile`); names in checkpoints stay.

    Args:
        device: Type of the device that they will run on.
        parts: What is compiled, each by itself.
    """
    if can_compile(device):
        for part in parts:
            part.compile()
