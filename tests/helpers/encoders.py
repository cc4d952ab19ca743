"""Encoders of other modalities than pictures, as anybody would write them: one class each, in a file of one's own."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from owl.nn.posterior import Posterior


class DepthEncoder(nn.Module):
    """Depth maps to a grid of an eighth of their size."""

    modalities: ClassVar = {"depth": 1}
    latent_channels = 2

    def __init__(self, size: tuple[int, int] = (32, 48)) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"size": list(size)}
        self.size, self.latent_size = tuple(size), (size[0] // 8, size[1] // 8)
        self.encoder = nn.Conv2d(1, 2, 8, stride=8)

    def encode(self, depth: Tensor) -> Posterior:
        mean = self.encoder(depth)
        return Posterior(mean, torch.full_like(mean[:, :1], -4.0))


class SceneEncoder(nn.Module):
    """Pictures, depth and flow together."""

    modalities: ClassVar = {"rgb": 3, "depth": 1, "flow": 2}
    latent_channels = 4
    size, latent_size = (32, 48), (4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.encoder = nn.Conv2d(6, 4, 8, stride=8)

    def encode(self, rgb: Tensor, depth: Tensor, flow: Tensor) -> Posterior:
        mean = self.encoder(torch.cat([rgb, depth, F.interpolate(flow, rgb.shape[2:])], 1))
        return Posterior(mean, torch.full_like(mean[:, :1], -4.0))


class SoundEncoder(nn.Module):
    """Stereo sound to tokens of ``hop`` samples; each hears its neighbours too."""

    modalities: ClassVar = {"audio": 2}
    latent_channels = 3
    sample_rate = 44_100

    def __init__(self, hop: int = 420, wrong_by: int = 0) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"hop": hop, "wrong_by": wrong_by}
        self.hop, self._wrong_by = hop, wrong_by
        self.encoder = nn.Conv1d(2, 3, 3 * hop, stride=hop, padding=hop)

    def encode(self, audio: Tensor) -> Posterior:
        mean = self.encoder(audio)[..., : audio.shape[-1] // self.hop - self._wrong_by]
        return Posterior(mean, torch.full_like(mean[:, :1], -4.0))
