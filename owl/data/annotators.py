"""Annotators, which add members to the frames of a dataset, and those of optical flow.

`python -m owl data annotate` writes a copy of a dataset with the members of several annotators.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl.data import codecs
from owl.data.flow import estimate_flow
from owl.data.jobs import Made
from owl.data.modalities.flow import Flow
from owl.data.source import SampleReader, Source
from owl.errors import OwlError
from owl.hardware import default_device
from owl.nn.placement import placement
from owl.pixels import to_float

RAFT_MULTIPLE, RAFT_SMALLEST = 8, 128
"""RAFT takes sides that are multiples of 8, and of at least 128 pixels."""
SCALE = ("step", "offset", "inverse")
"""Keys of a description of depth that map its levels to distances."""


def stored_scale(existing: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the range of depth of an interrupted copy from its description; None for a new copy."""
    return {name: existing[name] for name in SCALE} if existing is not None and set(SCALE) <= existing.keys() else None


class Annotator(ABC):
    """Base class of annotators. They must be picklable; each process of a job has one copy.

    Each reads the frames itself, in the size and with the neighbours that it needs, so several run in one pass.

    Attributes:
        modalities: Description of each modality that it adds, for dataset.json.
    """

    modalities: dict[str, dict[str, Any]]

    @abstractmethod
    def members(self, source: Source, episode: int) -> Iterator[dict[str, bytes]]:
        """Yield the new members of each frame of an episode by extension; ends before a damaged frame.

        Args:
            source: The dataset, which has rgb.
            episode: Number of the episode in its index.
        """

    @staticmethod
    def made_by(description: dict[str, Any]) -> Made:
        """Return what a modality was made with, from its description."""
        return Made(description["made_by"]["identity"], description["made_by"]["path"])


def pictures(source: Source, episode: int, together: int) -> Iterator[np.ndarray]:
    """Yield the rgb of an episode in spans of ``together`` frames: uint8[n, H, W, 3]."""
    reader = SampleReader(replace(source, taken=("rgb",), kept=("rgb",)))
    for sample, _ in reader.stretches(episode, together):
        yield np.ascontiguousarray(sample["rgb"].movedim(1, -1).numpy())


class FlowAnnotator(Annotator):
    """Optical flow by OpenCV's DIS, or by a RAFT of torchvision with weights of a local file.

    Args:
        size: (H, W) of the frames.
        weights: File with the ``state_dict`` of torchvision's raft_large or raft_small. None: DIS.

    Raises:
        OwlError: The file is missing or damaged, or holds another network; or the frames are too small for DIS.
    """

    together = 16

    def __init__(self, size: tuple[int, int], weights: str | None = None) -> None:
        self.size, self.weights = size, weights
        self.network = None if weights is None else load_raft(weights)
        identity = "opencv-dis" if weights is None else hash_file(Path(weights))
        description = Flow.describe(size)
        self.downscale = int(description["downscale"])
        self.modalities = {"flow": {**description, "made_by": {"path": weights or "OpenCV", "identity": identity}}}
        if weights is None:
            black = np.zeros((*size, 3), np.uint8)
            estimate_flow(black, black, self.downscale)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.size, self.weights)

    def members(self, source: Source, episode: int) -> Iterator[dict[str, bytes]]:
        previous: np.ndarray | None = None
        for frames in pictures(source, episode, self.together):
            if previous is None:
                previous = frames[0]
                flows = [np.zeros((*(side // self.downscale for side in self.size), 2), np.float32)]
                flows += self.estimate(frames)
            else:
                flows = self.estimate(np.concatenate([previous[None], frames]))
            for flow in flows:
                if not np.isfinite(flow).all():
                    raise OwlError(
                        "flow.non-finite",
                        f"the network of {self.weights} gives flow with NaN or infinity in episode "
                        f"{source.index.episodes[episode]} of {source.url}, expected numbers; use other weights",
                    )
                yield {Flow.extension: Flow.encode(flow)}
            previous = frames[-1]

    def estimate(self, frames: np.ndarray) -> list[np.ndarray]:
        """Estimate the flow of uint8[n, H, W, 3], each back to its predecessor: n - 1 of float32[h, w, 2]."""
        if self.network is not None:
            return list(raft_flow(self.network, frames, self.downscale)) if len(frames) > 1 else []
        return [estimate_flow(one, other, self.downscale) for one, other in pairwise(frames)]


def load_raft(path: str) -> nn.Module:
    """Load a RAFT (Teed and Deng 2020) of torchvision, on the GPU if there is one.

    Raises:
        OwlError: The file is missing or damaged, or holds another network.
    """
    from torchvision.models.optical_flow import raft_large, raft_small  # takes a second

    advice = "save the state_dict of torchvision's raft_large or raft_small there, or leave out --flow_weights for DIS"
    if not Path(path).is_file():
        raise OwlError("flow.weights", f"there is no file {path}, expected the weights of RAFT; {advice}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    except Exception as error:  # torch.load raises nearly every kind
        reason = " ".join(str(error).split())
        raise OwlError("flow.weights", f"{path} is no file of weights ({reason}); {advice}") from error
    for build in (raft_large, raft_small):
        network: nn.Module = build(weights=None, progress=False)
        if {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == shapes:
            network.load_state_dict(weights)
            return network.eval().to(default_device())
    raise OwlError("flow.weights", f"{path} holds other weights than those of RAFT; {advice}")


@torch.inference_mode()
def raft_flow(network: nn.Module, frames: np.ndarray, downscale: int) -> np.ndarray:
    """Estimate the flow of consecutive frames back to their predecessors.

    Args:
        network: RAFT.
        frames: uint8[n, H, W, 3], n at least 2.
        downscale: Pixels per cell of the grid, over which the flow is averaged.

    Returns:
        float32[n - 1, H // downscale, W // downscale, 2], pixels of the frames.
    """
    video = to_float(torch.from_numpy(frames).to(placement(network).device).movedim(-1, 1))
    height, width = video.shape[-2:]
    below, right = (max(RAFT_SMALLEST, -(-side // RAFT_MULTIPLE) * RAFT_MULTIPLE) - side for side in (height, width))
    video = F.pad(video, (0, right, 0, below), mode="replicate")
    flow: Tensor = network(video[1:], video[:-1])[-1][..., :height, :width]
    return F.avg_pool2d(flow, downscale).movedim(1, -1).float().cpu().numpy()


def hash_file(path: Path) -> str:
    """Return sixteen hexadecimal digits of the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def depth_levels(inverse: np.ndarray, step: float, offset: float, size: tuple[int, int]) -> np.ndarray:
    """Convert inverse distances to the levels of a dataset's depth.

    Args:
        inverse: float[h, w]; NaN where nothing was measured, which becomes level 0.
        step: As in `owl.pixels.DepthScale`, with ``inverse``.
        offset: As above.
        size: (H, W) of the stored depth.

    Returns:
        uint8[H, W].
    """
    known = np.isfinite(inverse)
    levels = np.where(known, np.clip(np.rint(np.where(known, inverse, 0) / step - offset), 1, 255), 0)
    total, share = (codecs.resize(part.astype(np.float32), size) for part in (levels, known))
    # the mean over what was measured; where the middle of a pixel was, its share is above 0
    return np.where(codecs.nearest(known, size), np.rint(total / np.maximum(share, 1e-6)), 0).astype(np.uint8)


def depth_scale(samples: np.ndarray, source: str) -> dict[str, Any]:
    """Choose the scale of a dataset's depth from inverse distances of some of its frames.

    The range is that of 99% of them, of which the farthest is at most a hundred times as far as the nearest.

    Args:
        samples: float[n]; NaN where nothing was measured.
        source: Where they are from, for messages.

    Returns:
        ``step``, ``offset`` and ``inverse`` for dataset.json.

    Raises:
        OwlError: Nothing was measured, or everything at the same distance.
    """
    known = samples[np.isfinite(samples)]
    low, high = np.quantile(known, [0.005, 0.995]) if len(known) else (0.0, 0.0)
    low = max(low, high / 100)
    if not high > low > 0:
        raise OwlError(
            "depth.constant",
            f"depth from {source} is {'nowhere measured' if not len(known) else f'{high:g} (inverse) everywhere'}, "
            "expected distances that vary; use another source of depth",
        )
    step = float(f"{(high - low) / 254:.6g}")
    return {"step": step, "offset": float(f"{low / step - 1:.6g}"), "inverse": True}
