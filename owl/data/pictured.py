"""Depth and optical flow as pictures, which an autoencoder of pictures encodes (VideoJAM, Chefer et al. 2025)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from owl.data.flow import compose_flow
from owl.data.geometry import Camera, seen_from
from owl.data.modalities import MODALITIES
from owl.data.source import Source
from owl.errors import OwlError
from owl.pixels import UNKNOWN, DepthScale, flow_scale, flow_to_picture

PICTURED = {MODALITIES[modality].latent: modality for modality in ("flow", "depth")}
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
        delay: Frames by which depth is earlier; it is warped to the camera of the frame. 0: the frame's own.
        fps: Frames per second.
    """

    modality: str
    description: Mapping[str, Any]
    url: str
    size: tuple[int, int]
    stride: int
    delay: int
    fps: float

    @classmethod
    def of(cls, name: str, size: tuple[int, int], source: Source, stride: int, delay: float) -> "Pictured":
        """Return the pictures that latents of a name are made of.

        Args:
            name: Name of the latents, one of `PICTURED`.
            size: (H, W) of the pictures that the encoder takes.
            source: The dataset.
            stride: Frames over which flow leads back.
            delay: Seconds by which depth is earlier.

        Raises:
            OwlError: The frames have another size, the delay is less than half a frame, or the dataset does not state
                the scale of the modality.
        """
        modality = PICTURED[name]
        if source.info.size != size:
            stored, expected = ("x".join(map(str, sides)) for sides in (source.info.size, size))
            raise OwlError(
                "dataset.size",
                f"the frames of {source.url} are {stored} (height x width), the encoder of pictures takes {expected}; "
                "use footage of that size or an encoder that was trained on this one",
            )
        fps = source.info.fps
        frames = round(delay * fps) if modality == "depth" else 0
        if delay and modality == "depth" and not frames:
            raise OwlError(
                "arguments.too-small",
                f"depth_delay is {delay:g} s, {source.url} has {fps:g} frames per second, expected 0 or at least one "
                f"frame of {1 / fps:.4g} s; change depth_delay",
            )
        pictured = cls(modality, source.info.modalities[modality], source.url, size, stride, frames, fps)
        pictured.scale()
        return pictured

    def scale(self) -> dict[str, Any]:
        """Return what using their latents needs to know, for dataset.json: the scale, and the stride or the delay."""
        if self.modality == "flow":
            return {"scale": flow_scale(self.description, self.url), "stride": self.stride}
        scale = DepthScale.of(self.description, self.url)
        delayed = {"delay": self.delay / self.fps} if self.delay else {}
        return {"step": scale.step, "offset": scale.offset, "inverse": scale.inverse} | delayed

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
        past: dict[str, Tensor] = {}
        for tensors, kept in stretches:
            if self.delay:
                known = {name: torch.cat([past[name], x]) if past else x for name, x in tensors.items()}
                yield {"rgb": self._draw_earlier(known, len(kept))}, kept
                past = {name: x[-self.delay :] for name, x in known.items()}
                continue
            found = tensors[self.modality]
            if self.modality == "flow" and self.stride > 1:
                flows = [*earlier, *found.movedim(1, -1).contiguous().numpy()]
                found = self._added_up(flows, len(earlier))
                earlier = flows[1 - self.stride :]
            yield {"rgb": self.draw(found)}, kept

    def _draw_earlier(self, known: dict[str, Tensor], count: int) -> Tensor:
        """Draw the depth of ``delay`` frames earlier as the cameras of the last ``count`` frames see it.

        Args:
            known: "depth" float[N, 1, H, W], "pose" float[N, 5] and "intrinsics" float[N, 4] of consecutive frames, of
                which the first ones are either ``delay`` frames earlier or the first ones of the episode.
            count: Number of frames to draw.

        Returns:
            float[count, 3, H, W] in [-1, 1]; frames without an earlier one are drawn as unknown.
        """
        scale = DepthScale.of(self.description, self.url)
        pairs = max(0, len(known["pose"]) - self.delay)
        there, here = (
            Camera(known["pose"][frames], known["intrinsics"][frames]) for frames in (slice(pairs), slice(-pairs, None))
        )
        picture = known["depth"].new_full((count, *self.size), UNKNOWN)
        if pairs:
            picture[-pairs:] = scale.draw(seen_from(scale.measured(known["depth"][:pairs, 0]), there, here))
        return picture[:, None].clamp(-1, 1).expand(-1, 3, -1, -1)

    def _added_up(self, flows: list[np.ndarray], first: int) -> Tensor:
        """Return the flow back by ``stride`` frames, of frame ``first`` and those after it: float[B, 2, h, w]."""
        added = []
        for frame in range(first, len(flows)):
            total = flows[max(0, frame - self.stride + 1)]
            for flow in flows[max(0, frame - self.stride + 1) + 1 : frame + 1]:
                total = compose_flow(flow, total, self.size)
            added.append(total)
        return torch.from_numpy(np.stack(added)).movedim(-1, 1).contiguous()
