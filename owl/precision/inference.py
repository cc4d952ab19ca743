"""Quantisation of linear layers to float8 for inference (torchao)."""

from typing import Any, Literal, get_args

import torch
from torch import nn

from owl.errors import OwlError
from owl.nn.placement import placement
from owl.precision import backend
from owl.precision.probe import describe, fault, fits

Quantization = Literal["fp8_weight_only", "fp8_dynamic"]


def quantize(network: nn.Module, quantization: Quantization) -> int:
    """Quantise the weights of linear layers whose channels are multiples of 16 to eight bits, in place.

    With ``fp8_weight_only`` (one scale per row) the products stay in the network's dtype: this reduces memory traffic,
    which limits small batches. With ``fp8_dynamic`` (one scale per tensor) activations are also quantised and products
    are in float8, for which the GPU must have kernels. Convolutions are unchanged. Both are faster only with
    ``torch.compile`` and on GPUs.

    Args:
        network: In eval mode, on its final device. Do not save its ``state_dict`` afterwards.
        quantization: See above.

    Returns:
        Number of converted layers; 0 for a network of convolutions.

    Raises:
        OwlError: torchao is missing, or the device does not support the quantisation.
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
    if (fault := probe(quantization, device)) is not None:
        raise OwlError(
            "fp8.device",
            f"{quantization} was expected to run on {describe(device)}, found: {fault}; use bf16"
            + (" or fp8_weight_only, which runs" if probe("fp8_weight_only", device) is None else ""),
        )
    library = backend.load("torchao.quantization")
    library.quantize_(network, configuration(quantization), filter_fn=lambda layer, name: name in names)
    return len(names)


def configuration(quantization: Quantization) -> Any:
    """Return torchao's configuration, without its changes of global compiler settings."""
    library = backend.load("torchao.quantization")
    if quantization == "fp8_weight_only":
        return library.Float8WeightOnlyConfig(set_inductor_config=False)
    return library.Float8DynamicActivationFloat8WeightConfig(set_inductor_config=False)


def probe(quantization: Quantization, device: torch.device) -> str | None:
    """Run a small layer; return a description of the failure, or None."""

    def convert(layer: nn.Linear) -> nn.Module:
        network = nn.Sequential(layer)
        backend.load("torchao.quantization").quantize_(network, configuration(quantization))
        return network

    return fault(convert, device, train=False)
