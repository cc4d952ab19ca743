"""Networks that only run: their linear layers' weights in float8 (torchao)."""

from typing import Any, Literal, get_args

import torch
from torch import nn

from owl.errors import OwlError
from owl.nn.placement import placement
from owl.precision import backend
from owl.precision.probe import describe, fault, fits

Quantization = Literal["fp8_weight_only", "fp8_dynamic"]


def quantize(network: nn.Module, quantization: Quantization) -> int:
    """Store the weights of linear layers whose channels are multiples of 16 in eight bits, in place.

    With ``fp8_weight_only`` (one scale a row) the products stay in the network's dtype: less memory to read, which is
    what a small batch waits for. With ``fp8_dynamic`` (one scale a tensor) activations are rounded too and the products
    are those of float8, for which a GPU must have kernels. Convolutions stay as they are. Both pay under
    ``torch.compile`` alone, and on GPUs alone.

    Args:
        network: In eval mode on the device that it will run on. Its ``state_dict`` is no longer one to save.
        quantization: See above.

    Returns:
        How many layers were converted; none in a network of convolutions.

    Raises:
        OwlError: torchao is missing, or the device does not run it.
    """
    if quantization not in get_args(Quantization):
        raise OwlError(
            "fp8.quantization",
            f'quantization is "{quantization}", expected {" or ".join(get_args(Quantization))}; correct it',
        )
    names = [name for name, layer in network.named_modules() if fits(layer)]
    if not names:
        return 0
    device = placement(network).device
    if (told := probe(quantization, device)) is not None:
        raise OwlError(
            "fp8.device",
            f"{quantization} was expected to run on {describe(device)}, found: {told}; use bf16"
            + (" or fp8_weight_only, which runs" if probe("fp8_weight_only", device) is None else ""),
        )
    library = backend.load("torchao.quantization")
    library.quantize_(network, configuration(quantization), filter_fn=lambda layer, name: name in names)
    return len(names)


def configuration(quantization: Quantization) -> Any:
    """torchao's settings, without those that it would change in the compiler for everyone."""
    library = backend.load("torchao.quantization")
    if quantization == "fp8_weight_only":
        return library.Float8WeightOnlyConfig(set_inductor_config=False)
    return library.Float8DynamicActivationFloat8WeightConfig(set_inductor_config=False)


def probe(quantization: Quantization, device: torch.device) -> str | None:
    """Run a small layer; return what went wrong, None if nothing did."""

    def convert(layer: nn.Linear) -> nn.Module:
        network = nn.Sequential(layer)
        backend.load("torchao.quantization").quantize_(network, configuration(quantization))
        return network

    return fault(convert, device, train=False)
