"""Streams of latents that a world model generates or receives."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from owl.errors import OwlError


@dataclass(frozen=True)
class Stream:
    """One latent of every frame of a world model.

    Attributes:
        shape: (channels, height, width) of a frame's latent on the grid of the picture, or (tokens, channels) of a
            stream with separate tokens, such as sound. Streams on the grid share tokens.
        patch: Side of the square of latent positions per token, for streams on the grid.
        role: "generated", or "given" for every frame, such as encoded depth.
        weight: Weight of its loss, if it is generated.
        modality: Its name in datasets; None: the stream's name with ``_latent``, such as ``audio_latent``.
        dropout: Probability that training hides the stream's input in a frame to predict, if it is generated. Inner
            guidance (VideoJAM, Chefer et al. 2025) needs it.
        sinks: Learned tokens in every frame beside those of a stream with separate tokens. Their rotary position is the
            identity, so that attention to them does not depend on the distance. They stabilise training where few
            tokens of sound stand beside many of pictures (OmniForcing, arXiv:2603.11647).
        delay: Seconds by which its latents are earlier than the frame (``data encode --depth_delay``). Training takes
            it from the dataset and stores it in the network's ``config``.

    Raises:
        OwlError: The values are invalid.
    """

    shape: tuple[int, ...]
    patch: int = 1
    role: Literal["generated", "given"] = "generated"
    weight: float = 1.0
    modality: str | None = None
    dropout: float = 0.0
    sinks: int = 0
    delay: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if len(self.shape) not in (2, 3) or min(self.shape) < 1:
            raise OwlError(
                "network.arguments",
                f"a stream's shape is {list(self.shape)}, expected channels, height and width, or tokens and channels; "
                "correct shape",
            )
        if self.patch < 1 or any(side % self.patch for side in self.shape[1:]) or (self.patch > 1 and not self.on_grid):
            expected = (
                f"a divisor of the latent's {self.shape[1]}x{self.shape[2]} positions"
                if self.on_grid
                else "1 for tokens without a grid"
            )
            raise OwlError("network.arguments", f"patch is {self.patch}, expected {expected}; change patch")
        if self.role not in ("generated", "given"):
            raise OwlError("network.arguments", f'role is "{self.role}", expected generated or given; change role')
        if not 0 <= self.dropout < 1 or (self.dropout > 0 and self.role == "given"):
            raise OwlError(
                "network.arguments",
                f"dropout of a {self.role} stream is {self.dropout:g}, expected 0 or, of a generated one, a number "
                "from 0 to below 1; change dropout",
            )
        if self.sinks < 0 or (self.sinks > 0 and self.on_grid):
            raise OwlError(
                "network.arguments",
                f"sinks is {self.sinks}, expected 0 or, of a stream with separate tokens, more; change sinks",
            )

    @property
    def on_grid(self) -> bool:
        """Whether the stream is on the grid of the picture."""
        return len(self.shape) == 3

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens."""
        return (self.shape[1] // self.patch, self.shape[2] // self.patch) if self.on_grid else (1, self.shape[0])

    @property
    def own_tokens(self) -> int:
        """Tokens of a frame that no other stream shares, with its sinks."""
        return 0 if self.on_grid else self.shape[0] + self.sinks

    @property
    def channels(self) -> int:
        """Number of channels, each with a mean and a standard deviation."""
        return self.shape[0] if self.on_grid else self.shape[1]

    @property
    def features(self) -> int:
        """Values per token."""
        return self.channels * self.patch**2

    def tokens(self, latent: Tensor) -> Tensor:
        """float[B, F, *shape] -> float[B, F, tokens, features]."""
        if not self.on_grid:
            return latent
        return rearrange(latent, "b f c (h p) (w q) -> b f (h w) (c p q)", p=self.patch, q=self.patch)

    def latent(self, tokens: Tensor) -> Tensor:
        """Undo `tokens`."""
        if not self.on_grid:
            return tokens
        return rearrange(tokens, "b f (h w) (c p q) -> b f c (h p) (w q)", h=self.grid[0], p=self.patch, q=self.patch)

    def by_channel(self, values: Tensor) -> Tensor:
        """Reshape float[channels] to broadcast to latents."""
        return values[:, None, None] if self.on_grid else values


def hide(latent: Tensor, frames: Tensor | None = None) -> Tensor:
    """Hide a stream's input: zeros, which no noisy latent is.

    Args:
        latent: float[B, F, ...], x_t.
        frames: bool[B, F], the frames in which it is hidden; None: all.
    """
    if frames is None:
        return torch.zeros_like(latent)
    return latent.masked_fill(frames.reshape(*frames.shape, *[1] * (latent.ndim - frames.ndim)), 0)


def declared(streams: Mapping[str, Stream | Mapping]) -> dict[str, Stream]:
    """Return the streams of a network from its arguments, which can be plain values.

    Raises:
        OwlError: The streams are inconsistent.
    """
    found = {name: s if isinstance(s, Stream) else Stream(**s) for name, s in streams.items()}
    for name in found:
        if not name.isidentifier():
            raise OwlError("network.arguments", f'a stream is named "{name}", expected a word; rename it in streams')
    grids = {name: "x".join(map(str, s.grid)) for name, s in found.items() if s.on_grid}
    if len(set(grids.values())) > 1:
        raise OwlError(
            "network.arguments",
            f"streams have the grids {', '.join(f'{grid} ({name})' for name, grid in grids.items())}, expected the "
            "same number of tokens for all; change shape or patch",
        )
    if not any(s.role == "generated" for s in found.values()):
        raise OwlError(
            "network.arguments", f"no stream of {', '.join(found) or 'none'} is generated, expected one; change streams"
        )
    return found
