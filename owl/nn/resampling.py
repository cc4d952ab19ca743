"""Resampling: DC-AE down- and upsampling with shortcuts, and a learned resize between aspect ratios."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl.errors import OwlError
from owl.nn.convolution import convolution

# With a shortcut of variance about 1, this keeps the variance of the sum about constant over the stages.
SHORTCUT_CONVOLUTION_GAIN = 0.5


def down_skip(x: Tensor, out_channels: int, factor: int) -> Tensor:
    """Move space into channels, then average groups of neighbouring channels (DC-AE, Chen et al. 2024, fig. 4).

    Args:
        x: float[B, C, H, W], H and W multiples of ``factor``.
        out_channels: Divisor of C * factor^2.
        factor: Reduction of each side; 1 averages channels only.

    Returns:
        float[B, out_channels, H / factor, W / factor].
    """
    # Channels are reduced as the last dimension: with the second one, the gradient would lose channels_last, and every
    # preceding convolution would need a copy.
    unshuffled = F.pixel_unshuffle(x, factor).movedim(1, -1)
    return unshuffled.unflatten(-1, (out_channels, -1)).mean(-1).movedim(-1, 1)


class Down(nn.Module):
    """Convolution and pixel_unshuffle, with an averaging shortcut.

    Args:
        in_channels: Channels in; ``in_channels * factor^2`` is a multiple of ``out_channels``.
        out_channels: Channels out, a multiple of ``factor^2``.
        factor: Reduction of each side; 1 makes this the projection to the latent.
        gain: Norm of the convolution's filters at initialisation.
        weight_norm: Whether the convolution is weight-normalised.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        factor: int = 2,
        *,
        gain: float = SHORTCUT_CONVOLUTION_GAIN,
        weight_norm: bool,
    ) -> None:
        super().__init__()
        self.out_channels, self.factor = out_channels, factor
        self.conv = convolution(in_channels, out_channels // factor**2, 3, gain=gain, weight_norm=weight_norm)

    def forward(self, x: Tensor) -> Tensor:
        """float[B, in_channels, H, W] -> float[B, out_channels, H / factor, W / factor]."""
        return F.pixel_unshuffle(self.conv(x), self.factor) + down_skip(x, self.out_channels, self.factor)


class Up(nn.Module):
    """Convolution and pixel_shuffle, with a shortcut that repeats channels, then moves them into space.

    Args:
        in_channels: Channels in, a divisor of ``out_channels * factor^2``.
        out_channels: Channels out.
        factor: Growth of each side; 1 makes this the projection from the latent.
        gain: Norm of the convolution's filters at initialisation.
        weight_norm: Whether the convolution is weight-normalised.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        factor: int = 2,
        *,
        gain: float = SHORTCUT_CONVOLUTION_GAIN,
        weight_norm: bool,
    ) -> None:
        super().__init__()
        self.factor = factor
        self.conv = convolution(in_channels, out_channels * factor**2, 3, gain=gain, weight_norm=weight_norm)

    def forward(self, x: Tensor) -> Tensor:
        """float[B, in_channels, H, W] -> float[B, out_channels, H * factor, W * factor]."""
        # Both paths end in the same shuffle, so it is applied to the sum; the broadcast avoids the repeated copy of x,
        # and has the channels last for the reason given in down_skip.
        y = self.conv(x).movedim(1, -1).unflatten(-1, (x.shape[1], -1)) + x.movedim(1, -1).unsqueeze(-1)
        return F.pixel_shuffle(y.flatten(-2).movedim(-1, 1), self.factor)


class Resize(nn.Module):
    """Learned linear resampling of rows and columns, e.g. landscape 360x640 to square 512x512 and back.

    Each axis has a banded matrix, one row of learned taps per output position, that starts as exactly the
    antialiased bicubic interpolation of ``F.interpolate``. An axis with the same length is not changed.

    Args:
        size: (rows, columns) of the input.
        out_size: (rows, columns) of the output.

    Raises:
        OwlError: The input of ``forward`` has another size.
    """

    def __init__(self, size: tuple[int, int], out_size: tuple[int, int]) -> None:
        super().__init__()
        self.rows = None if size[0] == out_size[0] else BandedMatrix(size[0], out_size[0])
        self.columns = None if size[1] == out_size[1] else BandedMatrix(size[1], out_size[1])
        self.size = (size[0], size[1])
        # The axis that shrinks is first, which reduces the work for the other.
        self.rows_first = out_size[0] * size[1] <= size[0] * out_size[1]

    def forward(self, x: Tensor) -> Tensor:
        """float[B, C, *size] -> float[B, C, *out_size]."""
        if x.shape[2:] != self.size:
            raise OwlError(
                "network.input",
                f"the learned resize got {x.shape[2]}x{x.shape[3]} pixels, expected {self.size[0]}x{self.size[1]}; "
                "scaled or rotated latents require an autoencoder whose latent has the aspect ratio of the image",
            )
        if self.rows is not None and self.rows_first:
            x = self.rows() @ x
        if self.columns is not None:
            x = x @ self.columns().T
        if self.rows is not None and not self.rows_first:
            x = self.rows() @ x
        return x


class BandedMatrix(nn.Module):
    """A learned float[out_length, length] matrix that is zero outside the support of antialiased bicubic resampling.

    Args:
        length: Columns.
        out_length: Rows.
    """

    index: Tensor

    def __init__(self, length: int, out_length: int) -> None:
        super().__init__()
        self.length = length
        # Resampling the identity gives the operator of F.interpolate; on the CPU, also if the module is on "meta".
        identity = torch.eye(length, dtype=torch.float64, device="cpu")[None, None]
        matrix = F.interpolate(identity, (out_length, length), mode="bicubic", antialias=True)[0, 0]
        support = matrix != 0
        positions = torch.arange(length, device="cpu")
        first = torch.where(support, positions, length).amin(1)
        taps = int((torch.where(support, positions, -1).amax(1) - first).max()) + 1
        index = first.clamp(max=length - taps)[:, None] + torch.arange(taps, device="cpu")
        self.taps = nn.Parameter(torch.empty(out_length, taps))
        self.register_buffer("index", torch.empty(out_length, taps, dtype=torch.int64))
        with torch.no_grad():
            self.taps.copy_(matrix.gather(1, index))
            self.index.copy_(index)

    def forward(self) -> Tensor:
        """Return the matrix, float[out_length, length]."""
        return self.taps.new_zeros(self.taps.shape[0], self.length).scatter(1, self.index, self.taps)
