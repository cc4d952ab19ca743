"""Diffusion transformer that decodes latents: a rectified flow from noise to the image, conditioned on the latent."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from owl.errors import OwlError
from owl.flow_matching import SMALLEST_STEP, noise_levels, sample
from owl.models.image_autoencoder import check_latent
from owl.models.image_decoder import ImageDecoder
from owl.models.proxy import ProxyAutoencoder
from owl.nn.attention import Attend, attention_among, clip_frames
from owl.nn.rope import rope
from owl.nn.statistics import register_latent
from owl.nn.transformer import Block, Head, JointBlock, NoiseLevelEmbedding

LatentTokens = Literal["shared", "separate", "none"]
Prediction = Literal["velocity", "clean"]


class DiTDecoder(nn.Module):
    """Latent -> image, by a few steps of a rectified flow (DiT, Peebles and Xie 2023).

    A token is a patch of the noisy target. The latent enters twice: it is added to the tokens at the same place, and
    its positions are appended as tokens of their own that take part in attention. Rotary embedding gives a position of
    the latent and the patch at the same place the same angle, whatever the two grids. Noise level and, in shortcut
    models, step size enter through adaLN.

    The target is standardised: target = (image - base - mean) / std for each channel, where base is zero or what a
    convolutional decoder makes of the latent (the residual of CorrDiff, Mardani et al. 2023): only what the latent
    leaves open is then left to the flow, at a scale at which its noise levels matter.

    The convention of the whole project: x_t = (1 - t) x0 + t eps with t in [0, 1], velocity v = eps - x0.

    Args:
        channels: Channels of the image.
        size: (height, width) of the image in pixels.
        latent_size: (height, width) of the latent in positions.
        latent_channels: Channels of the latent.
        patch: (height, width) of the patch of one token; both divide the target's size.
        width: Channels of a token.
        depth: Layers.
        heads: Number of heads, each with a multiple of 16 channels.
        mlp_ratio: Hidden channels of the MLPs, as a multiple of ``width``.
        latent_tokens: "shared": the appended latent's tokens use the weights of the others; "separate": their own
            (MMDiT, Esser et al. 2024); "none": none are appended.
        prediction: What the last layer predicts: the "velocity", or the "clean" target, from which the velocity
            follows; this is better for patches with many values (Li and He 2025).
        shortcut: Whether the network is also conditioned on the step size (shortcut models, Frans et al. 2024).
        steps: Steps of `decode`; for shortcut models a power of two up to 128.
        guidance: Weight w of classifier-free guidance in `decode`, null + w (conditional - null); 1: none.
        base: Arguments of the `owl.models.image_decoder.ImageDecoder` to whose output the target is relative, set by
            `add_base`. None: none.
        proxy: Path of a frozen autoencoder, see `owl.models.proxy.ProxyAutoencoder`: the target is its latent instead
            of the image, and `decode` ends with its decoder. None: the target is the image.
        checkpoint: Whether training recomputes activations in the backward pass to save memory.

    Attributes:
        inputs: Shape of the latent by the name of the input, ``latent``. The buffers ``latent_mean``, ``latent_std``
            and ``latent_encoder`` identify the latents; see `owl.latents`.
        target: Shape (channels, height, width) of the flow's target.
        target_mean: float[channels], buffer: mean of the target before it is standardised.
        target_std: float[channels], buffer: its standard deviation.
        noise: float[*target], buffer: initial noise of every frame. The same noise for all avoids flicker.
        base: The frozen base, or None.
        proxy: The frozen proxy autoencoder, or None.
        config: The arguments above as plain values; building from them gives a network of the same shape.

    Raises:
        OwlError: The arguments do not describe a possible network.
    """

    latent_mean: Tensor
    latent_std: Tensor
    latent_encoder: Tensor
    target_mean: Tensor
    target_std: Tensor
    noise: Tensor

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        latent_size: tuple[int, int],
        latent_channels: int,
        patch: tuple[int, int] = (8, 8),
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        latent_tokens: LatentTokens = "shared",
        prediction: Prediction = "clean",
        shortcut: bool = False,
        steps: int = 4,
        guidance: float = 1.0,
        base: dict[str, Any] | None = None,
        proxy: str | dict[str, Any] | None = None,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "channels": channels,
            "size": list(size),
            "latent_size": list(latent_size),
            "latent_channels": latent_channels,
            "patch": list(patch),
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "latent_tokens": latent_tokens,
            "prediction": prediction,
            "shortcut": shortcut,
            "steps": steps,
            "guidance": guidance,
            "base": None,
            "proxy": None,
            "checkpoint": checkpoint,
        }
        self.channels = channels
        self.size = (size[0], size[1])
        self.latent_size = (latent_size[0], latent_size[1])
        self.latent_channels = latent_channels
        self.inputs = {"latent": (latent_channels, *self.latent_size)}
        self.target = (channels, *self.size)
        self.proxy: ProxyAutoencoder | None = None
        if proxy is not None:
            self.proxy = ProxyAutoencoder(proxy, self.size)
            self.config["proxy"] = self.proxy.config
            self.target = (self.proxy.latent_channels, *self.proxy.latent_size)
        self.patch = (patch[0], patch[1])
        self.width, self.heads = width, heads
        self.latent_tokens, self.prediction, self.shortcut = latent_tokens, prediction, shortcut
        self.steps, self.guidance, self.checkpoint = steps, guidance, checkpoint
        _check(self.target, self.patch, width, depth, heads, mlp_ratio, latent_tokens, prediction)
        self._check_steps(steps)

        self.grid = (self.target[1] // self.patch[0], self.target[2] // self.patch[1])
        self.tokens = (self.grid[0] * self.grid[1], latent_size[0] * latent_size[1] * (latent_tokens != "none"))
        features = self.target[0] * self.patch[0] * self.patch[1]
        self.level = NoiseLevelEmbedding(width)
        self.step = NoiseLevelEmbedding(width) if shortcut else None
        if self.step is not None:  # steps of every size start as the flow: few frames train each size
            nn.init.zeros_(self.step.second.weight)
            nn.init.zeros_(self.step.second.bias)
        self.target_in = nn.Linear(features, width)
        self.latent_local = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.latent_in = nn.Linear(latent_channels, width) if self.tokens[1] else None
        self.null = nn.Parameter(torch.randn(width) * 0.02)
        hidden = round(width * mlp_ratio)
        self.blocks = nn.ModuleList(
            JointBlock(width, heads, hidden, self.tokens)
            if latent_tokens == "separate"
            else Block(width, heads, hidden)
            for _ in range(depth)
        )
        self.target_out = Head(width, features)
        self.base: ImageDecoder | None = None
        if base is not None:
            self.add_base(ImageDecoder(**base))
        register_latent(self, "latent", latent_channels)
        self.register_buffer("target_mean", torch.zeros(self.target[0]))
        self.register_buffer("target_std", torch.ones(self.target[0]))
        self.register_buffer("noise", torch.randn(self.target, generator=torch.Generator().manual_seed(0)))

    @property
    def outer(self) -> list[nn.Module]:
        """Inputs, output and modulations, see `owl.optim.configuration.parameter_groups`."""
        ends: list[nn.Module | None] = [
            self.level,
            self.step,
            self.target_in,
            self.latent_local,
            self.latent_in,
            self.target_out,
        ]
        if self.base is not None:
            ends.append(self.base_in)
        modulations = [block.modulation for block in self.blocks.modules() if isinstance(block, Block)]
        return [*(layer for layer in ends if layer is not None), *modulations]

    def add_base(self, decoder: ImageDecoder) -> None:
        """Make the target the residual to a decoder's output, which also becomes an input; the decoder is not trained.

        Its weights are stored with those of this network.
        """
        self.base = decoder.requires_grad_(False)
        self.base_in = nn.Linear(self.target_in.in_features, self.width, bias=False)
        self.config["base"] = decoder.config

    def forward(
        self,
        x: Tensor,
        noise_level: Tensor,
        latent: Tensor,
        base: Tensor | None = None,
        step_size: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            x: float[B, *target], x_t of the standardised target.
            noise_level: float[B], t in [0, 1].
            latent: float[B, c, h, w], not standardised.
            base: float[B, *target], the result of `estimate`; needed by networks with a base.
            step_size: float[B], d, with which a shortcut model steps from t to t - d. None: the smallest.
            known: bool[B]; False: the learned null embedding replaces the latent. None: all are known.

        Returns:
            float[B, *target]: the velocity, in shortcut models its mean over the step.
        """
        condition = self.level(noise_level)
        if self.step is not None:
            condition = condition + self.step(
                torch.full_like(noise_level, SMALLEST_STEP) if step_size is None else step_size
            )
        condition = F.silu(condition)[:, None]
        tokens, turns, attend = self._embed(x, latent, base, known), self._turns(x.device), self._attend(x.device)
        for block in self.blocks:
            if self.checkpoint and self.training:
                tokens = activation_checkpoint(block, tokens, condition, turns, attend, use_reentrant=False)
            else:
                tokens = block(tokens, condition, turns, attend)
        predicted = self._unpatched(self.target_out(tokens[:, :, : self.tokens[0]], condition)[:, 0]).float()
        if self.prediction == "velocity":
            return predicted
        return (x - predicted) / noise_level.clamp(min=SMALLEST_STEP)[:, None, None, None]

    def estimate(self, latent: Tensor) -> Tensor | None:
        """Compute what the base decodes from a latent, in the space of the target; None without a base.

        Args:
            latent: float[B, c, h, w], not standardised.

        Returns:
            float[B, *target].
        """
        if self.base is None:
            return None
        with torch.no_grad():
            image = self.base(latent).float()
            return image if self.proxy is None else self.proxy.encode(image)

    def to_target(self, image: Tensor, base: Tensor | None) -> Tensor:
        """Convert images to standardised targets.

        Args:
            image: float[B, channels, H, W] in [-1, 1].
            base: The result of `estimate`.

        Returns:
            float[B, *target].
        """
        target = image if self.proxy is None else self.proxy.encode(image)
        target = target if base is None else target - base
        return (target - self.target_mean[:, None, None]) / self.target_std[:, None, None]

    def to_image(self, target: Tensor, base: Tensor | None) -> Tensor:
        """Undo `to_target`; gradients flow to ``target``."""
        image = target * self.target_std[:, None, None] + self.target_mean[:, None, None]
        image = image if base is None else image + base
        return image if self.proxy is None else self.proxy.decode(image)

    def decode(self, latent: Tensor, noise: Tensor | None = None, steps: int | None = None) -> Tensor:
        """Decode latents (not standardised) with Euler steps; deterministic unless ``noise`` is given.

        Args:
            latent: float[B, latent_channels, h, w].
            noise: float[B, *target] or float[*target], N(0, 1). None: the buffer ``noise``, the same for all frames.
            steps: Evaluations of the network. None: ``self.steps``.

        Returns:
            float[B, channels, H, W], trained towards [-1, 1] but not clipped, in the dtype of ``latent``.

        Raises:
            OwlError: The latent has another shape, or the number of steps is impossible.
        """
        check_latent(latent, *self.inputs["latent"])
        steps = self.steps if steps is None else steps
        self._check_steps(steps)
        noise = (self.noise if noise is None else noise).float().expand(len(latent), *self.target)
        base = self.estimate(latent)
        return self.to_image(self.generate(latent, base, noise, noise_levels(steps)), base).to(latent.dtype)

    def generate(self, latent: Tensor, base: Tensor | None, noise: Tensor, levels: Sequence[float]) -> Tensor:
        """Integrate the flow by Euler steps; gradients flow through all of them.

        Args:
            latent: float[B, c, h, w], not standardised.
            base: float[B, *target], the result of `estimate`.
            noise: float[B, *target], N(0, 1).
            levels: Noise level of each step, from 1 down; in shortcut models evenly spaced, a power of two of them.

        Returns:
            float[B, *target], standardised.
        """

        def velocity(x: Tensor, t: float, next_t: float) -> Tensor:
            level, step_size = (torch.full((len(x),), value, device=x.device) for value in (t, t - next_t))
            return self.guided(x, level, latent, base, step_size)

        return sample(velocity, noise, levels)

    def guided(
        self,
        x: Tensor,
        noise_level: Tensor,
        latent: Tensor,
        base: Tensor | None = None,
        step_size: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity with ``guidance``; arguments as of `forward`."""
        conditional: Tensor = self(x, noise_level, latent, base, step_size)
        if self.guidance == 1:
            return conditional
        null: Tensor = self(x, noise_level, latent, base, step_size, torch.zeros_like(noise_level, dtype=torch.bool))
        return null + self.guidance * (conditional - null)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Return row and column of the centre of every token in units of patches: float[tokens] each.

        The target's tokens come first, then those of the latent, in the same coordinate system.
        """
        places = [_centres(self.grid, self.grid)]
        if self.tokens[1]:
            places.append(_centres(self.latent_size, self.grid))
        rows, columns = torch.cat(places, 1)
        return rows, columns

    def _turns(self, device: torch.device) -> Tensor:
        rows, columns = (axis.to(device) for axis in self.positions())
        return rope(torch.zeros(1, dtype=torch.int64, device=device), rows, columns, self.width // self.heads)

    def _attend(self, device: torch.device) -> Attend:
        """Attention without a mask: on CPUs that of the world model, which takes a third of the kernel's time."""
        if device.type != "cpu":
            return F.scaled_dot_product_attention
        return attention_among(clip_frames(1, 1, device), 1, 0, causal=False, tokens=sum(self.tokens))

    def _embed(self, x: Tensor, latent: Tensor, base: Tensor | None, known: Tensor | None) -> Tensor:
        """Return the tokens of the target and of the latent, float[B, 1, tokens, width]."""
        if known is None:  # the null embedding always gets a gradient, for which DDP waits
            known = torch.ones(len(x), dtype=torch.bool, device=x.device)
        dtype = self.target_in.weight.dtype
        known, null = known[:, None, None], self.null.to(dtype)
        latent = (latent.float() - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]
        latent = latent.to(dtype)
        local = self.latent_local(latent)
        if self.grid != self.latent_size:
            # in float32: CPUs have no kernel for bfloat16
            local = F.interpolate(local.float(), self.grid, mode="bilinear", antialias=True).to(dtype)
        local = torch.where(known, local.flatten(2).mT, null)
        tokens = self.target_in(self._patched(x).to(dtype)) + local
        if base is not None:
            tokens = tokens + known * self.base_in(self._patched(base).to(dtype))
        if self.latent_in is not None:
            appended = torch.where(known, self.latent_in(latent.flatten(2).mT), null)
            tokens = torch.cat([tokens, appended], 1)
        return tokens[:, None]

    def _patched(self, x: Tensor) -> Tensor:
        return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch[0], q=self.patch[1])

    def _unpatched(self, tokens: Tensor) -> Tensor:
        (rows, _), (p, q) = self.grid, self.patch
        return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=p, q=q)

    def _check_steps(self, steps: int) -> None:
        if steps < 1 or (self.shortcut and (steps > 1 / SMALLEST_STEP or steps & (steps - 1))):
            expected = "a power of two from 1 to 128" if self.shortcut else "at least 1"
            raise OwlError("network.arguments", f"steps is {steps}, expected {expected}; change steps")


def _centres(grid: tuple[int, int], unit: tuple[int, int]) -> Tensor:
    """Return rows and columns of the centres of a grid's cells, float[2, cells], in a system of ``unit`` cells."""
    axes = [(torch.arange(count) + 0.5) * (whole / count) for count, whole in zip(grid, unit, strict=True)]
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")])


def _check(
    target: tuple[int, int, int],
    patch: tuple[int, int],
    width: int,
    depth: int,
    heads: int,
    mlp_ratio: float,
    latent_tokens: str,
    prediction: str,
) -> None:
    """Check the arguments; the error names the invalid value."""
    if min(patch) < 1 or target[1] % patch[0] or target[2] % patch[1]:
        raise OwlError(
            "network.arguments",
            f"patch is {patch[0]}x{patch[1]}, expected divisors of the target's size {target[1]}x{target[2]}; change "
            "patch",
        )
    if depth < 1 or heads < 1 or width % heads or width // heads % 16:
        raise OwlError(
            "network.arguments",
            f"width {width}, heads {heads}, depth {depth}: expected at least one layer and heads of a multiple of 16 "
            "channels; change width or heads",
        )
    if round(width * mlp_ratio) < 1:
        raise OwlError(
            "network.arguments", f"mlp_ratio is {mlp_ratio:g}, expected a number above 0 such as 4; change mlp_ratio"
        )
    for name, value, possible in (
        ("latent_tokens", latent_tokens, ("shared", "separate", "none")),
        ("prediction", prediction, ("velocity", "clean")),
    ):
        if value not in possible:
            raise OwlError("network.arguments", f'{name} is "{value}", expected {", ".join(possible)}; change {name}')
