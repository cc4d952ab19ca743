"""Layers of a diffusion transformer with noise level and controls per frame (DiT, adaLN)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl.nn.attention import Attend
from owl.nn.rope import apply_rope
from owl.nn.symlog import symlog

LEVEL_CHANNELS = 256  # sines and cosines of a noise level, as in DiT
LEVEL_SCALE = 1000.0  # scales noise levels in [0, 1] to the range of timesteps of the frequencies


class NoiseLevelEmbedding(nn.Module):
    """Embedding of noise levels: float[...] in [0, 1] -> float[..., width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(LEVEL_CHANNELS, width), nn.Linear(width, width)

    def forward(self, noise_level: Tensor) -> Tensor:
        """Embed noise levels, see above."""
        half = LEVEL_CHANNELS // 2
        # Neither a buffer, which a bfloat16 network would round, nor the default dtype, which can be bfloat16: angles
        # of a thousand radians need float32.
        exponents = torch.arange(half, dtype=torch.float32, device=noise_level.device) / half
        frequencies = torch.exp(-math.log(10000) * exponents)
        angles = noise_level.float()[..., None] * LEVEL_SCALE * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(waves)))


class ControlEmbedding(nn.Module):
    """Embedding of buttons and axes, with a learned vector for unknown controls, distinct from "nothing pressed".

    Args:
        buttons: Number of buttons.
        axes: Number of axes.
        width: Width of the vector.
    """

    def __init__(self, buttons: int, axes: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(buttons + axes, width), nn.Linear(width, width)
        self.unknown = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, buttons: Tensor, axes: Tensor, known: Tensor | None = None) -> Tensor:
        """Embed the controls.

        Args:
            buttons: float[..., B], 1 where a button is down.
            axes: float[..., A], movement of each axis in its unit.
            known: bool[...]; None if all controls are known.
        """
        given = torch.cat([buttons, symlog(axes)], -1).to(self.first.weight.dtype)
        embedded = self.second(F.silu(self.first(given)))
        if known is None:
            return embedded
        return torch.where(known[..., None], embedded, self.unknown.to(embedded.dtype))


class Modulation(nn.Module):
    """Linear map from a frame's condition to ``count`` shifts, scales or gates of its tokens, initialised to zero."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, count * width)
        self.count = count
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """float[B, F, width] -> ``count`` times float[B, F, 1, width]."""
        return self.linear(condition)[:, :, None].chunk(self.count, -1)


class Block(nn.Module):
    """Self-attention and MLP, both modulated by the frame's condition (adaLN-Zero, Peebles and Xie 2023).

    Args:
        width: Channels.
        heads: Number of heads, each with a multiple of 16 channels.
        hidden: Channels within the MLP.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = Modulation(width, 6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = HeadNorm(width // heads)
        self.key_norm = HeadNorm(width // heads)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, condition: Tensor, turns: Tensor, attend: Attend) -> Tensor:
        """Apply the block.

        Args:
            x: float[B, F, n, width], n tokens of each frame.
            condition: float[B, F, width], after its nonlinearity.
            turns: float[1 or B, F * n, head width / 2, 2], of `owl.nn.rope.rope`.
            attend: Masked attention over these frames and cached ones.

        Returns:
            Like ``x``.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        x = x + gate1 * self.attention(modulate(x, shift1, scale1), turns, attend)
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))

    def attention(self, x: Tensor, turns: Tensor, attend: Attend) -> Tensor:
        """Compute self-attention over all tokens of all frames allowed by the mask."""
        return self.out(attend(*self.heads_of(x, turns)).transpose(1, 2).reshape(x.shape))

    def heads_of(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, keys and values: float[B, F, n, width] -> float[B, heads, F * n, head width] each."""
        batch, frames, tokens, width = x.shape
        query, key, value = (
            self.qkv(x).view(batch, frames * tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        )
        # norm and rotation always in float32; when compiled, they are fused
        query = apply_rope(self.query_norm(query.float()), turns).to(value.dtype)
        key = apply_rope(self.key_norm(key.float()), turns).to(value.dtype)
        return query, key, value

    def mlp(self, x: Tensor) -> Tensor:
        """Apply the MLP to each token."""
        return self.down(F.relu(self.up(x)).square())


class JointBlock(nn.Module):
    """A block with separate weights for two groups of tokens, which attend to each other (MMDiT, Esser et al. 2024).

    Args:
        width: Channels.
        heads: Number of heads, each with a multiple of 16 channels.
        hidden: Channels within the MLPs.
        tokens: Number of tokens of each group.
    """

    def __init__(self, width: int, heads: int, hidden: int, tokens: tuple[int, int]) -> None:
        super().__init__()
        self.first, self.second = Block(width, heads, hidden), Block(width, heads, hidden)
        self.tokens = list(tokens)

    def forward(self, x: Tensor, condition: Tensor, turns: Tensor, attend: Attend) -> Tensor:
        """Apply the block to the tokens of one frame, float[B, 1, n, width]; see `Block.forward`."""
        groups, parts = (self.first, self.second), x.split(self.tokens, 2)
        shift1, scale1, gate1, shift2, scale2, gate2 = zip(
            *(block.modulation(condition) for block in groups), strict=True
        )
        projected = [
            block.heads_of(modulate(part, *modulation), own)
            for block, part, own, *modulation in zip(
                groups, parts, turns.split(self.tokens, -3), shift1, scale1, strict=True
            )
        ]
        joined = (torch.cat(tensors, 2) for tensors in zip(*projected, strict=True))
        attended = attend(*joined).transpose(1, 2).reshape(x.shape).split(self.tokens, 2)
        outputs = []
        for i, (block, part) in enumerate(zip(groups, parts, strict=True)):
            part = part + gate1[i] * block.out(attended[i])
            outputs.append(part + gate2[i] * block.mlp(modulate(part, shift2[i], scale2[i])))
        return torch.cat(outputs, 2)


class HeadNorm(nn.Module):
    """RMS norm of each head's queries or keys, which bounds the attention logits (QK norm, Dehghani et al. 2023)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """float32[..., channels] -> the same, also for weights of lower precision."""
        return F.rms_norm(x, x.shape[-1:], self.weight.float(), eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply layer norm without weights, then the frame's shift and scale."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Head(nn.Module):
    """Last layer of one stream: modulated norm and a linear map initialised to zero."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.modulation = Modulation(width, 2)
        self.linear = zero_linear(width, channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """float[B, F, n, width], float[B, F, width] -> float[B, F, n, channels]."""
        return self.linear(modulate(x, *self.modulation(condition)))


def zero_linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """Return a linear layer initialised to zero."""
    linear = nn.Linear(inputs, outputs, bias)
    nn.init.zeros_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear
