"""Rotary position embedding over (time, row, column), exact at any time."""

import torch
from torch import Tensor

PERIOD = 65536  # period of the temporal rotation in frames, an hour at 18 frames/s
SPATIAL_BASE = 100.0  # grids have tens of rows: slower rotations could not distinguish positions


def split_channels(head_width: int) -> tuple[int, int]:
    """Divide a head's channels: a quarter (even) for time, half of the rest for rows, half for columns.

    Raises:
        ValueError: ``head_width`` is no multiple of 16.
    """
    if head_width % 16:
        raise ValueError(f"head_width is {head_width}, expected a multiple of 16")
    return head_width // 4, head_width * 3 // 8


def time_frequencies(channels: int, device: torch.device | None = None) -> Tensor:
    """Return the number of turns per `PERIOD` in time, as integers: int64[channels / 2].

    They are geometric from one radian per frame down to a 64th of that. Since every pair of channels makes an integer
    number of turns in a period, ``time % PERIOD`` gives the same angles as ``time``: cached rotated keys stay valid in
    rollouts of any length, without the loss of precision of large angles and without rotating the cache again.
    """
    slowest, fastest = PERIOD / (2 * torch.pi * 64), PERIOD / (2 * torch.pi)
    steps = torch.linspace(0, 1, max(2, channels // 2), dtype=torch.float64, device=device)[: channels // 2]
    return (fastest * (slowest / fastest) ** steps).round().long()


def rope(time: Tensor, row: Tensor, column: Tensor, head_width: int, placed: Tensor | None = None) -> Tensor:
    """Compute the rotation of every token as cosine and sine (RoFormer, Su et al. 2021, in three axes).

    Args:
        time: int64[..., F], number of each frame, of any magnitude.
        row: float[n], row of each token of a frame.
        column: float[n], column of each token of a frame.
        head_width: Channels of a head, a multiple of 16.
        placed: bool[n], whether a token has a position; the rotation of others is the identity. None: all have one.

    Returns:
        float32[..., F * n, head_width / 2, 2]: cosine and sine.
    """
    for_time, for_space = split_channels(head_width)
    frequencies = time_frequencies(for_time, time.device)
    # integers up to here: the product is reduced to one period before the conversion to float
    phase = (time[..., None] % PERIOD * frequencies) % PERIOD
    in_time = phase.float() * (2 * torch.pi / PERIOD)  # [..., F, time / 2]
    exponents = torch.arange(0, for_space, 2, dtype=torch.float32, device=row.device) / for_space
    speeds = SPATIAL_BASE**-exponents
    in_space = torch.cat([row[:, None] * speeds, column[:, None] * speeds], 1)  # [n, space]
    frames, tokens = time.shape[-1], len(row)
    shape = (*time.shape[:-1], frames, tokens)
    angles = torch.cat(
        [in_time[..., None, :].expand(*shape, -1), in_space.expand(*shape, -1)],
        -1,
    ).flatten(-3, -2)
    if placed is not None:
        angles = angles.masked_fill(~placed.repeat(frames)[:, None], 0)
    return torch.stack([angles.cos(), angles.sin()], -1)


def apply_rope(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate pairs of channels.

    Args:
        x: float[B, heads, S, head_width]; channel i is paired with i + head_width / 2.
        turns: float[1 or B, S, head_width / 2, 2] of `rope`.

    Returns:
        Like ``x``; inner products of two rotated vectors depend only on the difference of their positions.
    """
    cos, sin = turns[..., None, :, :, :].unbind(-1)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
