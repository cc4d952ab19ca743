"""Discriminators without norms, for images of any aspect ratio, to train decoders adversarially.

`Discriminator.sides` arranges the two inputs whose logits are compared: true and generated images, consecutive frames
of both, or both images at once in either order. Layers and activations are twice differentiable, as the penalties of
`owl.losses.adversarial` require.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl.errors import OwlError
from owl.nn.convolution import ACTIVATION_GAIN, ResidualBlock, convolution, leaky_relu

HEAD_SIZE = 4  # R3GAN's last grid


class Discriminator(nn.Module):
    """Base class: defines which images are one input.

    Args:
        channels: Channels of an image.
        frames: Consecutive frames per input, as channels. With 2, the discriminator detects detail that flickers.
        paired: Whether an input holds the true and the generated image, so that the discriminator predicts their order
            (reconstruction GAN; HaCohen et al. 2024, "LTX-Video", section 2.1).

    Attributes:
        in_channels: Channels of an input.
    """

    def __init__(self, channels: int, frames: int, paired: bool) -> None:
        super().__init__()
        if min(channels, frames) < 1:
            raise OwlError(
                "network.arguments",
                f"channels is {channels} and frames {frames}, expected positive numbers; correct it",
            )
        self.channels, self.frames, self.paired = channels, frames, paired
        self.in_channels = channels * frames * (2 if paired else 1)

    def sides(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Arrange the two inputs that are compared.

        Args:
            real: float[B, T, channels, H, W] in [-1, 1], true clips of at least ``frames`` frames; or images without
                the axis T where ``frames`` is 1.
            fake: The same shape; the reconstruction of the same clips.

        Returns:
            The real and the fake side, float[N, in_channels, H, W] each; N counts frames, or runs of ``frames``
            consecutive frames. With ``paired``, both sides hold both images as channels: the true one first on the real
            side, the generated one first on the fake side; gradients reach ``fake`` through both.

        Raises:
            OwlError: The shapes differ or do not fit.
        """
        clips = real.ndim == 5 and real.shape[1] >= self.frames
        images = real.ndim == 4 and self.frames == 1
        if fake.shape != real.shape or not (clips or images) or real.shape[-3] != self.channels:
            raise OwlError(
                "network.input",
                f"the discriminator got images of {list(real.shape)} and {list(fake.shape)}, expected two equal shapes "
                f"[batch, time, {self.channels}, height, width] with at least {self.frames} frames; set the length of "
                "the data's windows, or the discriminator's channels and frames",
            )
        real, fake = (self._runs(images) for images in (real, fake))
        if self.paired:
            return torch.cat([real, fake], 1), torch.cat([fake, real], 1)
        return real, fake

    def _runs(self, images: Tensor) -> Tensor:
        """float[B, T, channels, H, W] -> float[B * (T - frames + 1), frames * channels, H, W]."""
        if images.ndim == 4:
            return images
        count = images.shape[1] - self.frames + 1
        return torch.cat([images[:, k : k + count] for k in range(self.frames)], 2).flatten(0, 1)


class ResNetDiscriminator(Discriminator):
    """The residual discriminator of R3GAN: one logit per image of any size.

    Huang et al. 2024, "The GAN is dead; long live the GAN! A Modern GAN Baseline", section 3: stages of bottleneck
    blocks with grouped convolutions, initialised by fix-up instead of normalised, bilinear downsampling between them,
    and a linear head over the last grid. That grid is 4x4 there; here a grid of any size
    is averaged to 4x4.

    Args:
        channels: Channels of an image.
        frames: Consecutive frames per input.
        paired: Whether an input holds the true and the generated image.
        widths: Channels of each stage, finest first; each has half the grid of the one before.
        blocks: Residual blocks of each stage.
        patch: Side in pixels of the patch that enters as one position, so that nothing runs at full resolution.
        group_size: Channels per group of the 3x3 convolutions.

    Attributes:
        config: The arguments above as plain values; building from them gives a network of the same shape.

    Raises:
        OwlError: The arguments do not describe a possible network.
    """

    def __init__(
        self,
        channels: int = 3,
        frames: int = 1,
        paired: bool = False,
        widths: list[int] = [32, 64, 128, 256],  # noqa: B006  (never changed; a list is what YAML gives)
        blocks: list[int] = [1, 1, 2, 2],  # noqa: B006
        patch: int = 2,
        group_size: int = 16,
    ) -> None:
        super().__init__(channels, frames, paired)
        _check(widths, blocks, patch, group_size)
        self.config: dict[str, Any] = {
            "channels": channels,
            "frames": frames,
            "paired": paired,
            "widths": list(widths),
            "blocks": list(blocks),
            "patch": patch,
            "group_size": group_size,
        }
        self.patch = patch
        self.stem = convolution(self.in_channels * patch**2, widths[0], 1, weight_norm=False)
        depth = max(1, sum(blocks))
        self.stages = nn.Sequential()
        for i, width in enumerate(widths):
            if i > 0:
                self.stages.append(Halve(widths[i - 1], width))
            self.stages.extend(ResidualBlock(width, depth, group_size, weight_norm=False) for _ in range(blocks[i]))
        # no bias: it would cancel in the difference of logits
        self.head = nn.Linear(HEAD_SIZE**2 * widths[-1], 1, bias=False)
        nn.init.normal_(self.head.weight, std=self.head.in_features**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of one side.

        Args:
            images: float[N, in_channels, H, W] in [-1, 1]; H and W are multiples of ``patch``.

        Returns:
            float[N], logits, higher for images that look real, in the dtype of ``images`` also under autocast.

        Raises:
            OwlError: The images have another shape.
        """
        _check_images(images, self.in_channels, self.patch, self.patch)
        x = self.stages(self.stem(F.pixel_unshuffle(images, self.patch)))
        logits: Tensor = self.head(F.adaptive_avg_pool2d(x, HEAD_SIZE).flatten(1))
        return logits.squeeze(1).to(images.dtype)


class PatchDiscriminator(Discriminator):
    """PatchGAN: one logit for each of many overlapping patches.

    Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", section 3.2.2; with three
    ``layers`` a patch is 70x70 pixels. Without batch norm, which would make an image's logits depend on the others.

    Args:
        channels: Channels of an image.
        frames: Consecutive frames per input.
        paired: Whether an input holds the true and the generated image.
        width: Channels of the first layer; each layer after it has twice as many, at most 8 times as many.
        layers: Convolutions that halve the grid.

    Attributes:
        config: The arguments above as plain values; building from them gives a network of the same shape.

    Raises:
        OwlError: The arguments do not describe a possible network.
    """

    def __init__(
        self, channels: int = 3, frames: int = 1, paired: bool = False, width: int = 32, layers: int = 3
    ) -> None:
        super().__init__(channels, frames, paired)
        if min(width, layers) < 1:
            raise OwlError(
                "network.arguments", f"width is {width} and layers {layers}, expected positive numbers; correct it"
            )
        self.config: dict[str, Any] = {
            "channels": channels,
            "frames": frames,
            "paired": paired,
            "width": width,
            "layers": layers,
        }
        widths = [self.in_channels, *(width * min(2**i, 8) for i in range(layers + 1))]
        strides = [2] * layers + [1]
        # named as `owl.distributed.sharding.shard` expects parts that are called one by one
        self.blocks = nn.ModuleList(
            _patch_convolution(fine, coarse, stride, gain=ACTIVATION_GAIN if i else 1.0)
            for i, ((fine, coarse), stride) in enumerate(zip(pairwise(widths), strides, strict=True))
        )
        self.head = _patch_convolution(widths[-1], 1, 1, gain=ACTIVATION_GAIN, bias=False)
        # the last two convolutions, of stride 1, lose a row and a column each
        self.smallest = 3 * 2**layers

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of one side.

        Args:
            images: float[N, in_channels, H, W] in [-1, 1].

        Returns:
            float[N, h, w], logits, higher for images that look real, in the dtype of ``images`` also under autocast.

        Raises:
            OwlError: The images have another shape.
        """
        _check_images(images, self.in_channels, self.smallest, 1)
        x = images
        for block in self.blocks:
            x = leaky_relu(block(x))
        logits: Tensor = self.head(x)
        return logits.squeeze(1).to(images.dtype)


class Halve(nn.Module):
    """Bilinear downsampling by 2, which is the mean of 2x2 positions, then a 1x1 convolution where channels change.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        same = in_channels == out_channels
        self.conv = nn.Identity() if same else convolution(in_channels, out_channels, 1, bias=False, weight_norm=False)

    def forward(self, x: Tensor) -> Tensor:
        """float[B, in_channels, H, W] -> float[B, out_channels, ceil(H / 2), ceil(W / 2)]."""
        # keep the last row and column of odd sizes, so that every pixel affects the logit
        halved: Tensor = self.conv(F.avg_pool2d(x, 2, ceil_mode=True))
        return halved


def _patch_convolution(in_channels: int, out_channels: int, stride: int, gain: float, bias: bool = True) -> nn.Conv2d:
    """4x4 convolution whose filters have the norm ``gain`` at initialisation, as those of `convolution` have."""
    layer = nn.Conv2d(in_channels, out_channels, 4, stride, padding=1, bias=bias)
    with torch.no_grad():
        nn.init.normal_(layer.weight)
        layer.weight *= gain / layer.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        if layer.bias is not None:
            layer.bias.zero_()
    return layer


def _check(widths: list[int], blocks: list[int], patch: int, group_size: int) -> None:
    """Reject impossible arguments, naming the value at fault."""
    if not widths or min(*widths, patch, group_size) < 1:
        raise OwlError(
            "network.arguments",
            f"widths is {list(widths)}, patch {patch} and group_size {group_size}, expected positive numbers and at "
            "least one width; correct them",
        )
    if len(blocks) != len(widths) or min(blocks) < 0:
        raise OwlError(
            "network.arguments",
            f"blocks is {list(blocks)}, expected {len(widths)} counts of at least 0, one for each of {widths=}",
        )
    if any(width % group_size for width in widths):
        raise OwlError(
            "network.arguments",
            f"group_size is {group_size}, expected a divisor of every width of {list(widths)}; change one of them",
        )


def _check_images(images: Tensor, channels: int, smallest: int, multiple: int) -> None:
    """Reject images that a discriminator cannot read."""
    if (
        images.ndim != 4
        or images.shape[1] != channels
        or min(images.shape[2:]) < smallest
        or any(side % multiple for side in images.shape[2:])
    ):
        raise OwlError(
            "network.input",
            f"the discriminator got images of {list(images.shape)}, expected [batch, {channels}, height, width] with "
            f"sides of at least {smallest} pixels and multiples of {multiple}; change the data's size, or the "
            "discriminator's channels, patch or number of stages",
        )
