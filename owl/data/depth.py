"""Monocular depth, by a network of the package transformers in a local folder."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from owl.data.annotators import Annotator, depth_levels, depth_scale, hash_file, pictures, stored_scale
from owl.data.modalities.depth import Depth
from owl.data.source import Source
from owl.errors import OwlError
from owl.hardware import default_device
from owl.spacing import evenly_spaced

CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
SAMPLED = 64
"""Episodes whose first frame gives the range of a dataset's depth."""


class DepthAnnotator(Annotator):
    """Depth of single frames by a network such as Depth Anything, DPT or ZoeDepth.

    Networks that predict relative depth return inverse distances up to a factor; the others return distances. Levels
    are inverse distances in either case, on one range for the whole dataset.

    Args:
        folder: Folder as ``save_pretrained`` of transformers writes it: config.json, model.safetensors and
            preprocessor_config.json.
        scale: ``step``, ``offset`` and ``inverse`` of the dataset; see `of`.

    Raises:
        OwlError: The package is not installed, or the folder holds no network that predicts depth.
    """

    together = 8

    def __init__(self, folder: str, scale: dict[str, Any]) -> None:
        self.folder, self.scale = folder, scale
        self.network, self.processor = load_depth_network(folder)
        self.modalities = {
            "depth": {
                "extension": Depth.extension,
                "encoding": "uint8",
                "unit": "inverse distance, relative" if self.is_relative else "inverse distance",
                **scale,
                "made_by": {"path": folder, "identity": hash_file(Path(folder) / WEIGHTS)},
            }
        }

    @classmethod
    def of(cls, folder: str, source: Source, existing: dict[str, Any] | None) -> "DepthAnnotator":
        """Choose the range from the first frames of episodes that are evenly spaced over the dataset.

        Args:
            folder: The network.
            source: The dataset.
            existing: Description of depth in an interrupted copy, whose range is kept; None for a new copy.
        """
        if (scale := stored_scale(existing)) is not None:
            return cls(folder, scale)
        annotator = cls(folder, {})
        samples = [np.empty(0, np.float32)]
        for episode in evenly_spaced(len(source.index.episodes), SAMPLED):
            for frames in islice(pictures(source, episode, 1), 1):
                samples.append(annotator.predict(frames).ravel())
        return cls(folder, depth_scale(np.concatenate(samples), folder))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.scale)  # reload in another process

    @property
    def is_relative(self) -> bool:
        """Whether the network predicts inverse distances up to a factor."""
        kind = getattr(self.network.config, "depth_estimation_type", None)
        return kind == "relative" if kind is not None else self.network.config.model_type == "dpt"

    def members(self, source: Source, episode: int) -> Iterator[dict[str, bytes]]:
        for frames in pictures(source, episode, self.together):
            for inverse in self.predict(frames):
                levels = depth_levels(inverse, self.scale["step"], self.scale["offset"], source.info.size)
                yield {Depth.extension: Depth.encode(levels)}

    @torch.inference_mode()
    def predict(self, frames: np.ndarray) -> np.ndarray:
        """Predict the inverse distances of frames uint8[n, H, W, 3]: float32[n, H, W], NaN where there is none."""
        inputs = self.processor(images=list(frames), return_tensors="pt").to(self.network.device)
        depth: Tensor = self.network(**inputs).predicted_depth.float()
        depth = F.interpolate(depth[:, None], frames.shape[1:3], mode="bilinear", align_corners=False)[:, 0]
        inverse = depth.clamp(min=0) if self.is_relative else torch.where(depth > 0, 1 / depth, torch.nan)
        return torch.where(inverse.isfinite(), inverse, torch.nan).cpu().numpy()


def load_depth_network(folder: str) -> tuple[Any, Any]:
    """Load a network that predicts depth, and its image processor, from a local folder.

    Raises:
        OwlError: The package transformers is not installed, a file is missing, or the folder holds another network.
    """
    try:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation
    except ImportError as error:
        raise OwlError(
            "depth.package",
            f"depth of single frames needs the package transformers ({error}); install it with "
            "`pip install 'owl-platform[depth]'`",
        ) from error
    missing = [name for name in (CONFIG, WEIGHTS, PROCESSOR) if not (Path(folder) / name).is_file()]
    if missing:
        raise OwlError(
            "depth.folder",
            f"{folder} has no {' and no '.join(missing)}, expected a folder as save_pretrained of transformers writes "
            "it; download a network for depth estimation there",
        )
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        network, report = AutoModelForDepthEstimation.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (ValueError, OSError, KeyError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise OwlError(
            "depth.folder",
            f"{folder} holds no network that predicts depth ({reason}); give one of transformers' depth estimation",
        ) from error
    if absent := [*report["missing_keys"], *report["mismatched_keys"]]:  # they would stay random
        raise OwlError(
            "depth.folder",
            f"{folder}/{WEIGHTS} lacks {len(absent)} tensors such as {absent[0]}, expected those of {CONFIG}; download "
            "it again",
        )
    return network.eval().to(default_device()), processor
