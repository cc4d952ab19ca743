"""Convolutional KL autoencoder of single images, the first stage of latent world models."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from owl.errors import OwlError
from owl.nn.convolution import (
    NEGATIVE_SLOPE,
    Attention,
    FoldableNetwork,
    NormResidualBlock,
    ResidualBlock,
    convolution,
    group_norm,
)
from owl.nn.posterior import Posterior
from owl.nn.resampling import Down, Resize, Up

Norm = Literal["weight", "group", "none"]

LOGVAR_BOUND = 15.0  # exp(15 / 2) = 1,808 standard deviations: far above useful values, far below overflow
HEAD_GAIN = 0.25  # scales the decoder's activations, of variance 2 to 4, to about the variance of pictures
INITIAL_LOGVAR = -4.0  # a standard deviation of 0.14, so that noise does not dominate the first steps


class ImageAutoencoder(FoldableNetwork):
    """Image -> Gaussian latent on a coarse grid -> image.

    From the image to the latent: a learned resize if the image does not have the latent's aspect ratio, a patch of
    pixels per position (so that no convolution runs at full resolution), then one stage per entry of ``widths``, each
    with half the grid of the previous one, connected by the shortcuts of DC-AE (Chen et al. 2024). By default the
    blocks have neither norms nor a middle block, only weight normalisation, which folds away for inference.

    The grid of the finest stage times ``patch`` is ``latent_size * 2^(len(widths) - 1) * patch``. If that equals
    ``size`` there is no resize; otherwise encoder and decoder have one (360x640 <-> 512x512 for an 8x8 latent).

    Args:
        channels: Channels of the image.
        size: (height, width) of the image in pixels.
        latent_size: (height, width) of the latent in positions.
        latent_channels: Channels of the latent, a divisor of the last width.
        widths: Channels of each stage, finest first; four times each is a multiple of the next.
        blocks: Residual blocks of each stage of the encoder, finest first.
        decoder_blocks: The same for the decoder, also finest first; default: as in the encoder.
        patch: Side in pixels of the patch of one position.
        group_size: Channels per group of the 3x3 convolutions in the blocks; None: dense.
        norm: "weight" (weight normalisation only), "group" (group norms instead), or "none" (plain convolutions, as
            after folding).
        middle_block: Whether encoder and decoder have a residual block, self-attention and a residual block on the
            latent's grid.
        checkpoint: Whether training recomputes the blocks' activations in the backward pass to save memory.

    Attributes:
        encoder: float[B, channels, H, W] -> (mean float[B, c, h, w], logvar float[B, 1, h, w]).
        decoder: float[B, c, h, w] -> float[B, channels, H, W].
        losses: Names of the bottleneck's losses, each a method of the result of `encode`.
        latent_mean: float[c], buffer: mean of each latent channel in the last validation; zeros until measured.
        latent_std: float[c], buffer: its standard deviation; ones until measured. The statistics for later stages are
            measured on the training split by `owl.data.encoding` and stored in the dataset of latents.
        config: The arguments above as plain values; building from them gives a network of the same shape.

    Raises:
        OwlError: The arguments do not describe a possible network.
    """

    losses: ClassVar[tuple[str, ...]] = ("kl",)
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        channels: int = 3,
        size: tuple[int, int] = (96, 160),
        latent_size: tuple[int, int] = (12, 20),
        latent_channels: int = 4,
        widths: list[int] = [64, 128, 256],  # noqa: B006  (never changed; a list is what YAML gives)
        blocks: list[int] = [1, 2, 2],  # noqa: B006
        decoder_blocks: list[int] | None = None,
        patch: int = 2,
        group_size: int | None = None,
        norm: Norm = "weight",
        middle_block: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        decoder_blocks = blocks if decoder_blocks is None else decoder_blocks
        check_arguments(
            channels, size, latent_size, latent_channels, widths, blocks, decoder_blocks, patch, group_size, norm
        )
        self.config: dict[str, Any] = {
            "channels": channels,
            "size": list(size),
            "latent_size": list(latent_size),
            "latent_channels": latent_channels,
            "widths": list(widths),
            "blocks": list(blocks),
            "decoder_blocks": list(decoder_blocks),
            "patch": patch,
            "group_size": group_size,
            "norm": norm,
            "middle_block": middle_block,
            "checkpoint": checkpoint,
        }
        self.channels = channels
        self.size = (size[0], size[1])
        self.latent_size = (latent_size[0], latent_size[1])
        self.latent_channels = latent_channels
        grid = span(self.latent_size, widths, patch)
        shared = (channels, self.size, grid, latent_channels, widths)
        self.encoder = Encoder(*shared, blocks, patch, group_size, norm, middle_block, checkpoint)
        self.decoder = Decoder(*shared, decoder_blocks, patch, group_size, norm, middle_block, checkpoint)
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    @property
    def tsr(self) -> float:
        """Tensor-size reduction: elements of the image per element of the latent."""
        image = self.channels * self.size[0] * self.size[1]
        return image / (self.latent_channels * self.latent_size[0] * self.latent_size[1])

    @property
    def modalities(self) -> dict[str, int]:
        """Channels of each modality that ``encode`` takes."""
        return {"rgb": self.channels}

    def encode(self, image: Tensor) -> Posterior:
        """Encode images of the size the network was built for.

        Args:
            image: float[B, channels, H, W] in [-1, 1].

        Returns:
            The posterior over float[B, latent_channels, h, w], in the dtype of ``image`` also under autocast.

        Raises:
            OwlError: The image has other channels or another size.
        """
        check_image(image, self.channels, *self.size)
        mean, logvar = self.encoder(image)
        return Posterior(mean.to(image.dtype), logvar.to(image.dtype))

    def decode(self, latent: Tensor) -> Tensor:
        """Decode latents (not standardised).

        Args:
            latent: float[B, latent_channels, h, w].

        Returns:
            float[B, channels, H, W], trained towards [-1, 1] but not clipped, in the dtype of ``latent``.

        Raises:
            OwlError: The latent has other channels or another size.
        """
        check_latent(latent, self.latent_channels, *self.latent_size)
        image: Tensor = self.decoder(latent)
        return image.to(latent.dtype)

    def forward(self, image: Tensor, sample: bool) -> tuple[Tensor, Posterior]:
        """Reconstruct images.

        Args:
            image: float[B, channels, H, W] in [-1, 1].
            sample: Whether to decode a sample of the posterior (training) instead of its mean.

        Returns:
            The reconstruction, float[B, channels, H, W], and the posterior.
        """
        posterior = self.encode(image)
        return self.decode(posterior.sample() if sample else posterior.mean), posterior


class Encoder(nn.Module):
    """The first half of ``ImageAutoencoder``, whose arguments it shares; ``grid`` is the size after the resize."""

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        grid: tuple[int, int],
        latent_channels: int,
        widths: list[int],
        blocks: list[int],
        patch: int,
        group_size: int | None,
        norm: Norm,
        middle_block: bool,
        checkpoint: bool,
    ) -> None:
        super().__init__()
        weight_norm = norm == "weight"
        self.patch = patch
        self.resize = Resize(size, grid) if size != grid else nn.Identity()
        self.stem = convolution(channels * patch**2, widths[0], 3, weight_norm=weight_norm)
        stages: list[nn.Module] = []
        depth = _depth(blocks, middle_block)
        for i, width in enumerate(widths):
            if i > 0:
                stages.append(Down(widths[i - 1], width, weight_norm=weight_norm))
            stages += (_block(width, depth, group_size, norm) for _ in range(blocks[i]))
        if middle_block:
            stages += _middle(widths[-1], depth, group_size, norm)
        self.stages = Stages(stages, checkpoint)
        self.norm = group_norm(widths[-1]) if norm == "group" else nn.Identity()
        self.mean = Down(widths[-1], latent_channels, 1, gain=1, weight_norm=weight_norm)
        self.logvar = convolution(widths[-1], 1, 3, gain=0, weight_norm=weight_norm)
        with torch.no_grad():
            self.logvar.bias.fill_(INITIAL_LOGVAR)  # type: ignore[union-attr]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """float[B, channels, *size] -> mean float[B, c, h, w], logvar float[B, 1, h, w]."""
        x = self.norm(self.stages(self.stem(F.pixel_unshuffle(self.resize(image), self.patch))))
        # Bounded smoothly: a hard clamp has no gradient outside, so the log-variance could not recover.
        return self.mean(x), LOGVAR_BOUND * torch.tanh(self.logvar(x) / LOGVAR_BOUND)


class Decoder(nn.Module):
    """The second half of ``ImageAutoencoder``, whose arguments it shares; ``grid`` is the size before the resize."""

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        grid: tuple[int, int],
        latent_channels: int,
        widths: list[int],
        blocks: list[int],
        patch: int,
        group_size: int | None,
        norm: Norm,
        middle_block: bool,
        checkpoint: bool,
    ) -> None:
        super().__init__()
        weight_norm = norm == "weight"
        self.patch = patch
        self.stem = Up(latent_channels, widths[-1], 1, gain=1, weight_norm=weight_norm)
        stages: list[nn.Module] = []
        depth = _depth(blocks, middle_block)
        if middle_block:
            stages += _middle(widths[-1], depth, group_size, norm)
        for i in reversed(range(len(widths))):
            stages += (_block(widths[i], depth, group_size, norm) for _ in range(blocks[i]))
            if i > 0:
                stages.append(Up(widths[i], widths[i - 1], weight_norm=weight_norm))
        self.stages = Stages(stages, checkpoint)
        self.norm = group_norm(widths[0]) if norm == "group" else nn.Identity()
        self.head = convolution(widths[0], channels * patch**2, 3, gain=HEAD_GAIN, weight_norm=weight_norm)
        self.resize = Resize(grid, size) if size != grid else nn.Identity()

    def forward(self, latent: Tensor, hint: Tensor | None = None) -> Tensor:
        """float[B, c, h, w] -> float[B, channels, *size]; a hint float[B, widths[-1], h, w] is added to the stem."""
        x = self.stem(latent)
        if hint is not None:
            x = x + hint
        x = F.leaky_relu(self.norm(self.stages(x)), NEGATIVE_SLOPE)
        image: Tensor = self.resize(F.pixel_shuffle(self.head(x), self.patch))
        return image


class Stages(nn.Sequential):
    """A sequence whose parts are recomputed in the backward pass in training with ``checkpoint``."""

    def __init__(self, modules: Iterable[nn.Module], checkpoint: bool) -> None:
        super().__init__(*modules)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor) -> Tensor:
        """float[B, C, H, W] -> float[B, C', H', W']."""
        for module in self:
            if self.checkpoint and self.training and torch.is_grad_enabled():
                x = activation_checkpoint(module, x, use_reentrant=False)
            else:
                x = module(x)
        return x


def _depth(blocks: list[int], middle_block: bool) -> int:
    """Residual blocks in one half of the network, at least 1."""
    return max(1, sum(blocks) + 2 * middle_block)


def _block(width: int, depth: int, group_size: int | None, norm: Norm) -> nn.Module:
    if norm == "group":
        return NormResidualBlock(width, group_size)
    return ResidualBlock(width, depth, group_size, weight_norm=norm == "weight")


def _middle(width: int, depth: int, group_size: int | None, norm: Norm) -> list[nn.Module]:
    before = group_norm(width) if norm == "group" else nn.Identity()
    attention = Attention(width, before, weight_norm=norm == "weight")
    return [_block(width, depth, group_size, norm), attention, _block(width, depth, group_size, norm)]


def span(latent_size: tuple[int, int], widths: list[int], patch: int) -> tuple[int, int]:
    """(height, width) in pixels that the stages and the patch span."""
    factor = patch * 2 ** (len(widths) - 1)
    return latent_size[0] * factor, latent_size[1] * factor


def check_image(image: Tensor, channels: int, height: int, width: int) -> None:
    """Reject images that are not float[B, channels, height, width].

    Raises:
        OwlError: The image has another shape.
    """
    if image.ndim != 4 or image.shape[1:] != (channels, height, width):
        raise OwlError(
            "network.input",
            f"the image is {list(image.shape)}, expected [batch, {channels}, {height}, {width}]; "
            "set the data's size, or the network's size and channels, so that they agree",
        )


def check_latent(latent: Tensor, channels: int, height: int, width: int) -> None:
    """Reject latents that are not float[B, channels, height, width].

    Raises:
        OwlError: The latent has another shape.
    """
    if latent.ndim != 4 or latent.shape[1:] != (channels, height, width):
        raise OwlError(
            "network.input",
            f"the latent is {list(latent.shape)}, expected [batch, {channels}, {height}, {width}]; use latents of the "
            "autoencoder that the decoder belongs to",
        )


def check_arguments(
    channels: int,
    size: tuple[int, int],
    latent_size: tuple[int, int],
    latent_channels: int,
    widths: list[int],
    blocks: list[int],
    decoder_blocks: list[int],
    patch: int,
    group_size: int | None,
    norm: str,
) -> None:
    """Check that the geometry is valid; the error names the invalid value."""
    if norm not in ("weight", "group", "none"):
        raise OwlError("network.arguments", f'norm is "{norm}", expected "weight", "group" or "none"')
    for name, values in (
        ("channels", [channels]),
        ("size", size),
        ("latent_size", latent_size),
        ("latent_channels", [latent_channels]),
        ("widths", widths or [0]),
        ("patch", [patch]),
        ("group_size", [1 if group_size is None else group_size]),
    ):
        if min(values) < 1:
            raise OwlError("network.arguments", f"{name} is {list(values)}, expected positive numbers; correct {name}")
    for name, counts in (("blocks", blocks), ("decoder_blocks", decoder_blocks)):
        if len(counts) != len(widths) or min(counts) < 0:
            raise OwlError(
                "network.arguments",
                f"{name} is {counts}, expected {len(widths)} counts of at least 0, one for each of {widths=}",
            )
    for fine, coarse in pairwise(widths):
        if 4 * fine % coarse or coarse % 4:
            raise OwlError(
                "network.arguments",
                f"widths has {fine} before {coarse}, expected a multiple of 4 that divides {4 * fine} "
                "(the shortcut averages whole groups of channels); change widths",
            )
    if widths[-1] % latent_channels:
        raise OwlError(
            "network.arguments",
            f"latent_channels is {latent_channels}, expected a divisor of the last width {widths[-1]}; "
            "change latent_channels or widths",
        )
    if group_size is not None and any(width % group_size for width in widths):
        raise OwlError(
            "network.arguments",
            f"group_size is {group_size}, expected a divisor of every width of {widths}; change one of them",
        )
    grid = span(latent_size, widths, patch)
    if any(not 1 / 2 < inner / outer < 2 for inner, outer in zip(grid, size, strict=True)):
        raise OwlError(
            "network.arguments",
            f"a latent of {latent_size[0]}x{latent_size[1]} with {len(widths)} widths and patch {patch} spans "
            f"{grid[0]}x{grid[1]} pixels, expected less than a factor of 2 from size {size[0]}x{size[1]} on each side; "
            "add or remove a width, or change patch or latent_size",
        )
