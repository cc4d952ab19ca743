"""Test float8 support of a device, since torchao's table of capabilities is wrong for the RTX 5090 (sm_120)."""

from collections.abc import Callable

import torch
from torch import nn

MULTIPLE = 16
"""GPU kernels need matrix sizes that are multiples of this. CPU kernels do not, but layers must also run on GPUs."""
UNITS = {"cuda": (MULTIPLE, 1024)}
"""Units of the sizes of the tested layers: cuBLAS supports some sizes and rejects others. CPU kernels support all sizes
and are slow."""
TOLERANCE = 0.15
"""Relative error above which a product is wrong; the error of random numbers in eight bits is at most 0.06."""


def fits(layer: nn.Module) -> bool:
    """Return whether a module is a linear layer with a shape that float8 kernels support."""
    # subclasses may use their weights differently, such as the output projection of nn.MultiheadAttention
    return type(layer) is nn.Linear and not layer.in_features % MULTIPLE and not layer.out_features % MULTIPLE


def describe(device: torch.device) -> str:
    """Return the name of a device for messages."""
    if device.type != "cuda":
        return f"the {device.type.upper()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"


def fault(convert: Callable[[nn.Linear], nn.Module], device: torch.device, train: bool) -> str | None:
    """Convert layers in bfloat16, run them and compare the results with float32.

    Args:
        convert: Converts a layer to float8.
        device: Device to run on.
        train: Whether to run the backward pass too.

    Returns:
        Description of the failure, or None.
    """
    try:
        for unit in UNITS.get(device.type, (MULTIPLE,)):
            for name, error in errors(convert, device, train, unit).items():
                if not error < TOLERANCE:  # or NaN
                    return f"its {name} is wrong by {error:.0%}"
    except Exception as error:  # drivers, libraries and torchao raise different types
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(".: ")
    return None


def errors(convert: Callable[[nn.Linear], nn.Module], device: torch.device, train: bool, unit: int) -> dict[str, float]:
    """Return the relative errors of a layer's output and gradients, by name; see `fault`."""
    generator = torch.Generator().manual_seed(0)  # do not change the run's generator state
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
