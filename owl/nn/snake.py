"""Periodic activation for waveforms."""

from typing import Any

import torch
from torch import Tensor, nn


class SnakeBeta(nn.Module):
    """x + sin^2(e^a x) / e^b with a learned frequency e^a and amplitude 1 / e^b for each channel.

    Ziyin et al. 2020, "Neural Networks Fail to Learn Periodic Functions and How to Fix It", eq. 3, with the separate
    amplitude of BigVGAN (Lee et al. 2023). a = b = 0 at initialisation. Zero stays zero.

    Args:
        channels: C, channels of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_frequency = nn.Parameter(torch.zeros(channels))
        self.log_damping = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """float[B, C, N] -> float[B, C, N], in the dtype of ``x``."""
        # The parameters of a mixed-precision network are float32, its activations are not.
        frequency, damping = (value.exp().to(x.dtype)[:, None] for value in (self.log_frequency, self.log_damping))
        y: Tensor = _Snake.apply(x, frequency, damping.reciprocal())
        return y


class _Snake(torch.autograd.Function):
    """x + amplitude sin^2(frequency x), which stores its input only: autograd would keep four tensors of that size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frequency: Tensor, amplitude: Tensor) -> Tensor:
        ctx.save_for_backward(x, frequency, amplitude)
        return torch.addcmul(x, (frequency * x).sin_().square_(), amplitude)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, frequency, amplitude = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        phase = frequency * x
        sine = phase.sin()
        weighted = gradient * sine
        of_amplitude = (weighted * sine).sum((0, 2), dtype=wide).to(x.dtype)[:, None]
        weighted = weighted * phase.cos()  # d sin^2(phase) / d phase = 2 sin(phase) cos(phase)
        of_frequency = 2 * (weighted * x).sum((0, 2), dtype=wide).to(x.dtype)[:, None] * amplitude
        return torch.addcmul(gradient, weighted, 2 * frequency * amplitude), of_frequency, of_amplitude
