"""Convolution blocks: weight-normalised without norms, and their group-norm counterpart."""

import math
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

NEGATIVE_SLOPE = 0.2
ACTIVATION_GAIN = math.sqrt(
    2 / (1 + NEGATIVE_SLOPE**2)
)  # preserves the second moment through a leaky ReLU (He et al. 2015)
NORM_GROUPS = 32  # Wu & He 2018


def convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    gain: float = 1.0,
    groups: int = 1,
    bias: bool = True,
    weight_norm: bool = True,
) -> nn.Conv2d:
    """Build a "same" convolution whose filters all have the norm ``gain`` at initialisation.

    White input of unit variance therefore gives output of standard deviation ``gain`` for any fan-in.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd side of the square kernel.
        gain: Euclidean norm of every filter; 0 makes the layer output its bias (zero).
        groups: Channel groups, as in ``nn.Conv2d``.
        bias: Whether to learn a bias, initially zero.
        weight_norm: Whether to learn length and direction of every filter separately (Salimans & Kingma 2016).

    Returns:
        The layer, float[B, in_channels, H, W] -> float[B, out_channels, H, W].
    """
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=bias)
    initialise(layer, gain, weight_norm)
    return layer


@torch.no_grad()
def initialise(layer: nn.Conv1d | nn.Conv2d, gain: float, weight_norm: bool) -> None:
    """Give every filter of a layer a random direction and the norm ``gain``, and set its bias to zero, in place.

    Args:
        layer: A convolution without parametrisations.
        gain: Euclidean norm of every filter; 0 makes the layer output its bias.
        weight_norm: Whether to learn length and direction of every filter separately (Salimans & Kingma 2016).
    """
    if layer.bias is not None:
        layer.bias.zero_()
    direction = torch.randn_like(layer.weight)
    direction /= direction.flatten(1).norm(dim=1).view(-1, *[1] * (direction.ndim - 1))
    if weight_norm:
        # The direction must not be zero (0 / |0| is NaN), so a zero layer has a random direction of length 0.
        # Assigning `.weight` after the parametrisation is registered would discard the gain.
        layer.weight.copy_(direction)
        parametrizations.weight_norm(layer)
        layer.parametrizations.weight.original0.fill_(gain)  # type: ignore[union-attr,operator]
    else:
        layer.weight.copy_(direction * gain)


def fold_weight_norm(module: nn.Module) -> None:
    """Replace every weight-normalised weight in ``module`` by its current value, in place.

    The outputs stay the same up to rounding, without the cost of the normalisation per call.
    """
    for layer in module.modules():
        if is_weight_normed(layer):
            weight = folded_weight(layer)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            with torch.no_grad():
                layer.weight.copy_(weight)  # type: ignore[operator]


class FoldableNetwork(nn.Module):
    """A network whose ``config`` has an argument ``norm``, which is "weight" for weight-normalised convolutions."""

    config: dict[str, Any]

    def fold_weight_norm(self) -> Self:
        """Turn the weight-normalised convolutions into plain ones, in place: same outputs, faster, for inference.

        Returns:
            This network, now with ``config["norm"] == "none"`` if it was "weight".
        """
        fold_weight_norm(self)
        if self.config["norm"] == "weight":
            self.config["norm"] = "none"
        return self


def is_weight_normed(layer: nn.Module) -> bool:
    """Return whether a layer's weight is weight-normalised and not yet folded."""
    # other parametrisations have only one original
    return parametrize.is_parametrized(layer, "weight") and hasattr(layer.parametrizations.weight, "original1")  # type: ignore[union-attr]


def folded_weight(layer: nn.Module) -> Tensor:
    """Return the value of a weight-normalised weight, bit for bit the same on every machine.

    In torch, the summation order of a filter's norm depends on the vector width of the processor, and so would the last
    bit of the weight and every fingerprint.

    Args:
        layer: A layer for which `is_weight_normed` is true.

    Returns:
        float32, on the CPU, in the shape of the weight.
    """
    length, direction = (
        getattr(layer.parametrizations.weight, name).detach().to("cpu", torch.float64).numpy()  # type: ignore[union-attr]
        for name in ("original0", "original1")
    )
    # a running sum has a fixed order; squares of float32 are exact in float64
    norm = np.sqrt(np.cumsum(np.square(direction.reshape(len(direction), -1)), axis=1)[:, -1])
    return torch.from_numpy(direction * (length / norm.reshape(length.shape))).float()


def leaky_relu(x: Tensor) -> Tensor:
    """Leaky ReLU that overwrites its input, which must be a fresh convolution or norm output."""
    return F.leaky_relu(x, NEGATIVE_SLOPE, inplace=True)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm of up to 32 groups, float[B, channels, H, W] -> the same."""
    return nn.GroupNorm(math.gcd(NORM_GROUPS, channels), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Bottleneck without norms: x + 1x1(act(3x3(act(1x1(x))))), after R3GAN (Huang et al. 2024).

    Fix-up initialisation (Zhang et al. 2019) replaces normalisation: with m layers per branch and L branches, all
    but the last layer have their gain scaled by L^(-1/(2m-2)) and the last is zero, so that the block starts as the
    identity and an update changes the whole network by the same amount at any depth.

    Args:
        width: Channels in and out.
        depth: L, residual blocks in the whole encoder or decoder.
        group_size: Channels per group of the 3x3 convolution; None for a dense one.
        weight_norm: Whether the convolutions are weight-normalised.
    """

    def __init__(self, width: int, depth: int, group_size: int | None, weight_norm: bool) -> None:
        super().__init__()
        layers = 3
        gain = ACTIVATION_GAIN * depth ** (-1 / (2 * layers - 2))
        groups = 1 if group_size is None else width // group_size
        self.conv1 = convolution(width, width, 1, gain=gain, weight_norm=weight_norm)
        self.conv2 = convolution(width, width, 3, gain=gain, groups=groups, weight_norm=weight_norm)
        self.conv3 = convolution(width, width, 1, gain=0, bias=False, weight_norm=weight_norm)

    def forward(self, x: Tensor) -> Tensor:
        """float[B, width, H, W] -> float[B, width, H, W]."""
        return x + self.conv3(leaky_relu(self.conv2(leaky_relu(self.conv1(x)))))


class NormResidualBlock(nn.Module):
    """The same bottleneck with a group norm and an activation before each convolution (pre-activation order).

    Args:
        width: Channels in and out.
        group_size: Channels per group of the 3x3 convolution; None for a dense one.
    """

    def __init__(self, width: int, group_size: int | None) -> None:
        super().__init__()
        groups = 1 if group_size is None else width // group_size
        self.norm1, self.norm2, self.norm3 = group_norm(width), group_norm(width), group_norm(width)
        self.conv1 = convolution(width, width, 1, gain=ACTIVATION_GAIN, weight_norm=False)
        self.conv2 = convolution(width, width, 3, gain=ACTIVATION_GAIN, groups=groups, weight_norm=False)
        self.conv3 = convolution(width, width, 1, gain=0, weight_norm=False)

    def forward(self, x: Tensor) -> Tensor:
        """float[B, width, H, W] -> float[B, width, H, W]."""
        y = self.conv1(leaky_relu(self.norm1(x)))
        y = self.conv2(leaky_relu(self.norm2(y)))
        return x + self.conv3(leaky_relu(self.norm3(y)))


class Attention(nn.Module):
    """Residual single-head self-attention over all positions, as in the middle block of common autoencoders.

    Args:
        width: Channels in and out.
        norm: Layer before the projections, float[B, width, H, W] -> the same.
        weight_norm: Whether the projections are weight-normalised.
    """

    def __init__(self, width: int, norm: nn.Module, weight_norm: bool) -> None:
        super().__init__()
        self.norm = norm
        self.qkv = convolution(width, 3 * width, 1, weight_norm=weight_norm)
        self.project = convolution(width, width, 1, gain=0, weight_norm=weight_norm)

    def forward(self, x: Tensor) -> Tensor:
        """float[B, width, H, W] -> float[B, width, H, W]."""
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # [B, H * W, 3 * width]
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)  # one head
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.project(y.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))
