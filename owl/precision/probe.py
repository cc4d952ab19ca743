"""What a device really runs in float8; tables tell wrongly: torchao's admits the RTX 5090 (sm_120) to too much."""

from collections.abc import Callable

import torch
from torch import nn

MULTIPLE = 16
"""Kernels of GPUs take factors whose sides are multiples of this. Those of CPUs take any, but what runs there must run
on GPUs."""
UNITS = {"cuda": (MULTIPLE, 1024)}
"""What the sides of the layers that are tried are multiples of: cuBLAS takes some sizes and refuses others. The CPU's
kernels do not care, and are slow."""
TOLERANCE = 0.15
"""Relative error above which a product is broken; that of random numbers in eight bits is at most 0.06."""


def fits(layer: nn.Module) -> bool:
    """Whether a module is a linear layer of a shape that float8 kernels take."""
    # subclasses may use their weights in ways of their own, as nn.MultiheadAttention's output does
    return type(layer) is nn.Linear and not layer.in_features % MULTIPLE and not layer.out_features % MULTIPLE


def describe(device: torch.device) -> str:
    """Name a device as messages do."""
    if device.type != "cuda":
        return f"the {device.type.upper()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"


def fault(convert: Callable[[nn.Linear], nn.Module], device: torch.device, train: bool) -> str | None:
    """Convert layers in bfloat16, run them and compare them with float32.

    Args:
        convert: Makes a layer one of float8.
        device: Where to run it.
        train: Whether to run it backward too.

    Returns:
        What went wrong, None if nothing did.
    """
    try:
        for unit in UNITS.get(device.type, (MULTIPLE,)):
            for name, error in errors(convert, device, train, unit).items():
                if not error < TOLERANCE:  # nor NaN
                    return f"its {name} is wrong by {error:.0%}"
    except Exception as error:  # whatever a driver, a library or torchao may raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(".: ")
    return None


def errors(convert: Callable[[nn.Linear], nn.Module], device: torch.device, train: bool, unit: int) -> dict[str, float]:
    """Relative errors of a layer's output and gradients, by name; see `fault`."""
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay what they are
    x, weight, gradient = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16)
        for shape in ((3 * unit, 4 * unit), (2 * unit, 4 * unit), (3 * unit, 2 * unit))
    )
    plain = nn.utils.skip_init(nn.Linear, 4 * unit, 2 * unit, bias=False, device=device)
    plain.weight = nn.Parameter(weight.clone())
    given = x.clone().requires_grad_(train)
    layer = convert(plain)
    with torch.set_grad_enabled(train):
        output = layer(given)
    compared = {"output": (output, x.float() @ weight.float().T)}
    if train:
        output.backward(gradient)
        compared["input's gradient"] = (given.grad, gradient.float() @ weight.float())
        compared["weight's gradient"] = (layer.weight.grad, gradient.float().T @ x.float())
    return {
        name: ((found.float() - expected).norm() / expected.norm()).item()
        for name, (found, expected) in compared.items()
    }
