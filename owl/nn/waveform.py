"""Convolutions along time, for whole sequences and for streams of chunks with the same result.

A layer declares the windows that it reads. A whole sequence is padded with zeros at both ends; in a `Stream` each layer
keeps the steps that its next window needs, so that chunks of any length give the output of the whole, each step
computed once. In the causal form no output depends on later inputs.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl.nn.convolution import initialise
from owl.nn.snake import SnakeBeta

SNAKE_GAIN = 1.307**-0.5
"""Preserves the second moment through `SnakeBeta`: E[(x + sin^2 x)^2] = 1 + 3/8 - e^-2/2 + e^-8/8 for x ~ N(0, 1)."""
KERNEL = 7
"""Kernel of residual units, as in DAC (Kumar et al. 2023) and Oobleck."""


class Windowed(nn.Module):
    """Base class of layers that map windows of ``span`` steps, ``stride`` apart, to one or more steps each.

    Attributes:
        convolution: Maps the windows; `Up1d` and `Unblocks` spread its outputs over the steps of a block.
        span: Steps in a window.
        stride: Steps from one window to the next.
        padding: Zeros before and after a whole sequence.
    """

    convolution: nn.Conv1d

    def __init__(self, span: int, stride: int, padding: tuple[int, int]) -> None:
        super().__init__()
        self.span, self.stride, self.padding = span, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Map a whole sequence, float[B, C, N]."""
        return self.valid(F.pad(x, self.padding))

    def valid(self, x: Tensor) -> Tensor:
        """Map the complete windows of float[B, C, N], N at least ``span``."""
        y: Tensor = self.convolution(x)
        return y

    def reach(self, first: int, last: int) -> tuple[int, int]:
        """Return the first and the last input step, numbered from 0, on which outputs ``first`` to ``last`` depend."""
        before = self.padding[0]
        return first * self.stride - before, last * self.stride - before + self.span - 1


class Convolution1d(Windowed):
    """Convolution whose filters have the norm ``gain`` at initialisation (see `owl.nn.convolution.convolution`).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: Odd number of taps.
        dilation: Steps from one tap to the next.
        gain: Euclidean norm of every filter; 0 makes the layer output its bias (zero).
        bias: Whether to learn a bias, initially zero.
        causal: Whether the window ends at the output's step instead of being centred on it.
        weight_norm: Whether to learn length and direction of every filter separately.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        dilation: int = 1,
        gain: float = 1.0,
        bias: bool = True,
        causal: bool,
        weight_norm: bool,
    ) -> None:
        reach = (kernel - 1) * dilation
        super().__init__(reach + 1, 1, (reach, 0) if causal else (reach // 2, reach // 2))
        self.convolution = nn.Conv1d(in_channels, out_channels, kernel, dilation=dilation, bias=bias)
        initialise(self.convolution, gain, weight_norm)


class Down1d(Windowed):
    """Strided convolution with 2 x ``stride`` taps: float[B, in_channels, N * stride] -> float[B, out_channels, N].

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Factor, at least 2.
        gain: Euclidean norm of every filter.
        causal: Whether output n reads the inputs of the steps n - 1 and n, instead of those around the middle of n.
        weight_norm: As in `Convolution1d`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, gain: float, causal: bool, weight_norm: bool
    ) -> None:
        before = stride if causal else (stride + 1) // 2
        super().__init__(2 * stride, stride, (before, stride - before))
        self.convolution = nn.Conv1d(in_channels, out_channels, 2 * stride, stride)
        initialise(self.convolution, gain, weight_norm)


class Up1d(Windowed):
    """Transposed convolution with 2 x ``factor`` taps: float[B, in_channels, N] -> float[B, out_channels, N * factor].

    Computed as a convolution of two taps with an output channel for each of the ``factor`` steps, so that weight
    normalisation has one length per output channel and step, and CPUs run a plain convolution.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        factor: Output steps per input step, at least 2.
        gain: Euclidean norm of every filter.
        causal: Whether the outputs of step n depend on the inputs n - 1 and n, instead of the two nearest.
        weight_norm: As in `Convolution1d`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, factor: int, *, gain: float, causal: bool, weight_norm: bool
    ) -> None:
        super().__init__(2 if causal else 3, 1, (1, 0) if causal else (1, 1))
        self.factor = factor
        self.shift = 0 if causal else (factor + 1) // 2
        self.convolution = nn.Conv1d(in_channels, out_channels * factor, 2)
        initialise(self.convolution, gain, weight_norm)

    def valid(self, x: Tensor) -> Tensor:
        """float[B, in_channels, N] -> float[B, out_channels, (N - span + 1) * factor]."""
        blocks = self.convolution(x).unflatten(1, (-1, self.factor)).transpose(2, 3).flatten(2)
        windows = x.shape[-1] - self.span + 1
        y: Tensor = blocks[..., self.shift : self.shift + windows * self.factor]
        return y

    def reach(self, first: int, last: int) -> tuple[int, int]:
        """See `Windowed.reach`."""
        return (first + self.shift) // self.factor - 1, (last + self.shift) // self.factor


class Sum(nn.Module):
    """branch(x) + shortcut(x).

    Args:
        branch: A sequence of layers of this module, `SnakeBeta` and other layers without memory.
        shortcut: Such a layer, of which no output depends on more inputs than that of the branch.
    """

    def __init__(self, branch: nn.Sequential, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """float[B, C, N] -> float[B, C', N']."""
        y: Tensor = self.branch(x) + self.shortcut(x)
        return y


class ResidualUnit(Sum):
    """x + 1x1(snake(dilated(snake(x)))), without norms.

    Fix-up initialisation as in `owl.nn.convolution.ResidualBlock`: the last layer is zero, so that the unit starts as
    the identity.

    Args:
        width: Channels in and out.
        dilation: Steps between the 7 taps of the first convolution.
        depth: Residual units in the whole encoder or decoder.
        causal: As in `Convolution1d`.
        weight_norm: As in `Convolution1d`.
    """

    def __init__(self, width: int, dilation: int, depth: int, *, causal: bool, weight_norm: bool) -> None:
        layers = 2
        gain = SNAKE_GAIN * depth ** (-1 / (2 * layers - 2))
        branch = nn.Sequential(
            SnakeBeta(width),
            Convolution1d(width, width, KERNEL, dilation=dilation, gain=gain, causal=causal, weight_norm=weight_norm),
            SnakeBeta(width),
            Convolution1d(width, width, 1, gain=0, bias=False, causal=causal, weight_norm=weight_norm),
        )
        super().__init__(branch, nn.Identity())


class Blocks(Windowed):
    """Linear map of blocks of ``size`` steps to one step each: float[B, channels, N * size] -> float[B, features, N].

    It starts as `cosines`.

    Args:
        channels: Channels of the input.
        features: Channels of the output.
        size: Steps of a block.
        gain: Factor of the initial map.
    """

    def __init__(self, channels: int, features: int, size: int, gain: float) -> None:
        super().__init__(size, size, (0, 0))
        self.convolution = nn.Conv1d(channels, features, size, size, bias=False)
        self.convolution.weight = nn.Parameter(gain * cosines(channels, features, size))


class Unblocks(Windowed):
    """Linear map of one step to a block of ``size`` steps: float[B, features, N] -> float[B, channels, N * size].

    It starts as the transpose of `cosines`, which inverts it as far as its features go.

    Args:
        features: Channels of the input.
        channels: Channels of the output.
        size: Steps of a block.
        gain: Factor of the initial map.
    """

    def __init__(self, features: int, channels: int, size: int, gain: float) -> None:
        super().__init__(1, 1, (0, 0))
        self.size = size
        self.convolution = nn.Conv1d(features, channels * size, 1, bias=False)
        transposed = cosines(channels, features, size).flatten(1).T[..., None].contiguous()
        self.convolution.weight = nn.Parameter(gain * transposed)

    def valid(self, x: Tensor) -> Tensor:
        """float[B, features, N] -> float[B, channels, N * size]."""
        y: Tensor = self.convolution(x).unflatten(1, (-1, self.size)).transpose(2, 3).flatten(2)
        return y

    def reach(self, first: int, last: int) -> tuple[int, int]:
        """See `Windowed.reach`."""
        return first // self.size, last // self.size


def cosines(channels: int, features: int, size: int) -> Tensor:
    """Return the lowest frequencies of the orthonormal discrete cosine transform of blocks of sound.

    The transform is DCT-II along time and along channels, which makes sum and difference of two channels (Ahmed et al.
    1974, "Discrete cosine transform").

    Args:
        channels: Channels of the sound.
        features: Number of coefficients: all channels of the lowest frequency first.
        size: Samples of a block.

    Returns:
        float[features, channels, size], orthonormal rows; zeros where there are more features than samples.
    """
    products = torch.einsum("ts,kc->tkcs", _cosines(size), _cosines(channels)).flatten(0, 1)[:features]
    return F.pad(products, (0, 0, 0, 0, 0, features - len(products)))


def _cosines(size: int) -> Tensor:
    """Orthonormal DCT-II, float[frequency, step]."""
    steps = torch.arange(size)
    basis = torch.cos(math.pi / size * (steps + 0.5) * steps[:, None]) * math.sqrt(2 / size)
    basis[0] *= math.sqrt(0.5)
    return basis


def reach(layers: Iterable[nn.Module], first: int, last: int) -> tuple[int, int]:
    """Return the first and the last input step on which outputs ``first`` to ``last`` of a sequence of layers depend.

    Args:
        layers: Layers of this module, `SnakeBeta` and other layers without memory.
        first: Output step, numbered from 0.
        last: Output step, at least ``first``.

    Returns:
        Input steps; negative ones, and those after the end, are padding.
    """
    for layer in reversed(list(layers)):
        if isinstance(layer, Sum):
            first, last = reach(layer.branch, first, last)
        elif isinstance(layer, Windowed):
            first, last = layer.reach(first, last)
    return first, last


class Stream:
    """Apply a sequence of layers to chunks of a sequence; all outputs together are those of the whole sequence.

    Args:
        layers: Layers of this module, `SnakeBeta` and other layers without memory.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._steps = [_step(layer) for layer in layers]

    def __call__(self, x: Tensor, last: bool = False) -> Tensor:
        """Add a chunk.

        Args:
            x: float[B, C, n], n at least 0, always of the same B.
            last: Whether the sequence ends with this chunk.

        Returns:
            The outputs that are now determined, float[B, C', m]: of causal layers all outputs of the chunk, otherwise
            those that do not depend on inputs after it.
        """
        for step in self._steps:
            x = step(x, last)
        return x


class _Pointwise:
    """A layer without memory in a stream."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        y: Tensor = self._layer(x)
        return y


class _Windows:
    """A layer that reads windows, in a stream."""

    def __init__(self, layer: Windowed) -> None:
        self._layer = layer
        self._waiting: Tensor | None = None

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        layer, (before, after) = self._layer, self._layer.padding
        x = F.pad(x, (before if self._waiting is None else 0, after if last else 0))
        if self._waiting is not None:
            x = torch.cat([self._waiting, x], -1)
        windows = max(0, (x.shape[-1] - layer.span) // layer.stride + 1)
        self._waiting = x[..., windows * layer.stride :]
        if windows == 0:  # the layer's number of channels, but no steps
            return layer.valid(x.new_zeros(*x.shape[:2], layer.span))[..., :0]
        return layer.valid(x[..., : (windows - 1) * layer.stride + layer.span])


class _Sum:
    """A sum in a stream: the shortcut waits until the branch has caught up with it."""

    def __init__(self, layer: Sum) -> None:
        self._branch, self._shortcut = Stream(layer.branch), Stream([layer.shortcut])
        self._waiting: Tensor | None = None

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        y, x = self._branch(x, last), self._shortcut(x, last)
        if self._waiting is not None:
            x = torch.cat([self._waiting, x], -1)
        self._waiting = x[..., y.shape[-1] :]
        return x[..., : y.shape[-1]] + y


def _step(layer: nn.Module) -> _Pointwise | _Windows | _Sum:
    if isinstance(layer, Sum):
        return _Sum(layer)
    return _Windows(layer) if isinstance(layer, Windowed) else _Pointwise(layer)
