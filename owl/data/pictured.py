"""Depth and optical flow as pictures, which an autoencoder of pictures encodes (VideoJAM, Chefer et al. 2025)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from owl.data.flow import compose_flow
from owl.data.source import Source
from owl.errors import OwlError
from owl.pixels import DepthScale, flow_scale, flow_to_picture

PICTURED = {"motion_latent": "flow", "depth_latent": "depth"}
"""Modality that an encoder of pictures encodes under the name of its latents."""

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Pictured:
    """A modality as pictures of three channels.

    Attributes:
        modality: "flow", drawn by `owl.pixels.flow_to_picture`, or "depth", by `owl.pixels.DepthScale.to_picture`.
        description: Its entry in dataset.json.
        url: The dataset, for messages.
        size: (H, W) of the pictures.
        stride: Frames over which flow leads back.
    """

    modality: str
    description: Mapping[str, Any]
    url: str
    size: tuple[int, int]
    stride: int

    @classmethod
    def of(cls, name: str, size: tuple[int, int], source: Source, stride: int) -> "Pictured":
        """Return the pictures that latents of a name are made of.

        Args:
            name: Name of the latents, one of `PICTURED`.
            size: (H, W) of the pictures that the encoder takes.
            source: The dataset.
            stride: Frames over which flow leads back.

        Raises:
            OwlError: The frames have another size, or the dataset does not tell the scale of the modality.
        """
        modality = PICTURED[name]
        if source.info.size != size:
            stored, expected = ("x".join(map(str, sides)) for sides in (source.info.size, size))
            raise OwlError(
                "dataset.size",
                f"the frames of {source.url} are {stored} (height x width), the encoder of pictures takes {expected}; "
                "use footage of that size or an encoder that was trained on this one",
            )
        pictured = cls(modality, source.info.modalities[modality], source.url, size, stride)
        pictured.scale()
        return pictured

    def scale(self) -> dict[str, Any]:
        """Return what decoding their latents needs to know, for dataset.json: the scale and, for flow, the stride."""
        if self.modality == "flow":
            return {"scale": flow_scale(self.description, self.url), "stride": self.stride}
        scale = DepthScale.of(self.description, self.url)
        return {"step": scale.step, "offset": scale.offset, "inverse": scale.inverse}

    def draw(self, tensor: Tensor) -> Tensor:
        """Draw a modality as in windows, [B, ...], as float[B, 3, H, W] in [-1, 1]."""
        if self.modality == "flow":
            return flow_to_picture(tensor, flow_scale(self.description, self.url), self.size).clamp(-1, 1)
        depth = DepthScale.of(self.description, self.url).to_picture(tensor)
        return depth.clamp(-1, 1).expand(-1, 3, -1, -1)

    def stretches(
        self, stretches: Iterable[tuple[dict[str, Tensor], list[Kept]]]
    ) -> Iterator[tuple[dict[str, Tensor], list[Kept]]]:
        """Replace the modality in consecutive spans of an episode by its pictures, as "rgb"."""
        earlier: list[np.ndarray] = []
        for tensors, kept in stretches:
            found = tensors[self.modality]
            if self.modality == "flow" and self.stride > 1:
                flows = [*earlier, *found.movedim(1, -1).contiguous().numpy()]
                found = self._added_up(flows, len(earlier))
                earlier = flows[1 - self.stride :]
            yield {"rgb": self.draw(found)}, kept

    def _added_up(self, flows: list[np.ndarray], first: int) -> Tensor:
        """Return the flow back by ``stride`` frames, of frame ``first`` and those after it: float[B, 2, h, w]."""
        added = []
        for frame in range(first, len(flows)):
            total = flows[max(0, frame - self.stride + 1)]
            for flow in flows[max(0, frame - self.stride + 1) + 1 : frame + 1]:
                total = compose_flow(flow, total, self.size)
            added.append(total)
        return torch.from_numpy(np.stack(added)).movedim(-1, 1).contiguous()
