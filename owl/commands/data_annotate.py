"""``python -m owl data annotate``: label a dataset with controls predicted from its frames."""

import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from owl import models
from owl.data import codecs
from owl.data.jobs import Frames, Made, ShardJob, local_folder, run
from owl.data.shards import INDEX_NAME, DatasetInfo, ShardIndex
from owl.data.source import SampleReader, Source
from owl.errors import OwlError, at_least
from owl.models.inverse_dynamics import AFTER, BEFORE, InverseDynamicsModel
from owl.nn.placement import placement
from owl.pixels import to_float

EXTENSION = "controls.npy"
FRAMES = 64  # frames per batch of the network


def main(source: str, directory: str, *, controls: str, workers: int = 0) -> None:
    """Predict the player's controls from the frames of a dataset and write a copy of the dataset with them.

    All other members are copied byte for byte, and the splits are unchanged. Train the network first, on footage of the
    same game and frame rate with known controls, with stride 1: experiments/inverse_dynamics_quickstart.yaml with
    --data.init_args.stride 1. A GPU is used if there is one.

    After an interruption or a full disk, run the same command again: complete shards are kept.

    Args:
        source: The dataset to label: a folder, or any fsspec URL.
        directory: Local folder for the copy; created if missing.
        controls: A .ckpt file of the recipe owl.recipes.inverse_dynamics.InverseDynamics.
        workers: Processes, each with a copy of the network; 0 labels in this process.
    """
    at_least(0, workers=workers)
    is_complete = (Path(directory) / INDEX_NAME).exists()
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)
        info = annotate(source, directory, Labeller.load(controls), workers)
    frames = int(ShardIndex.load(directory).episode_frames.sum())
    complete = "is complete already and was left as it is: it " if is_complete else ""
    print(f"{directory} {complete}holds {frames:,} frames, {', '.join(info.modalities)}")
    print(f"look at it: python -m owl data inspect {shlex.quote(directory)}")


@dataclass(frozen=True)
class Labeller:
    """An inverse dynamics model and its checkpoint."""

    network: InverseDynamicsModel
    checkpoint: str
    fingerprint: str

    @classmethod
    def load(cls, checkpoint: str) -> "Labeller":
        """Load the network from a checkpoint.

        Raises:
            OwlError: It is not a checkpoint, contains another network, or one trained with a stride above 1.
        """
        network, content = models.rebuild(checkpoint)
        if not isinstance(network, InverseDynamicsModel):
            raise OwlError(
                "network.kind",
                f"the network of {checkpoint} is {type(network).__qualname__}, which does not predict controls; give a "
                "checkpoint of the recipe owl.recipes.inverse_dynamics.InverseDynamics",
            )
        stride = content["owl"]["config"]["data"]["init_args"].get("stride", 1)
        if stride != 1:
            raise OwlError(
                "network.stride",
                f"the network of {checkpoint} was trained with stride {stride}, expected a stride of 1, since every "
                "frame is labelled; train one with --data.init_args.stride 1",
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(network.to(device), checkpoint, models.fingerprint(network))

    def __reduce__(self) -> tuple[Any, ...]:
        return self.load, (self.checkpoint,)  # reload in another process, since not every network can be pickled

    def label(self, frames: np.ndarray) -> np.ndarray:
        """Predict the controls of an episode.

        Args:
            frames: uint8[T, h, w, 3], at the network's size.

        Returns:
            float32[T, buttons + axes]; those of frame 0 are 0.
        """
        device = placement(self.network).device
        parts = []
        for first in range(0, len(frames), FRAMES):
            begin = max(0, first - BEFORE)  # with the neighbouring frames that the network uses
            video = torch.from_numpy(frames[begin : first + FRAMES + AFTER]).to(device).movedim(-1, 1)
            buttons, axes = self.network.label(to_float(video[None]))
            parts.append(torch.cat([buttons, axes], -1)[0, first - begin :][:FRAMES].cpu().numpy())
        return np.concatenate(parts)


def annotate(source: str, directory: str | Path, labeller: Labeller, workers: int = 0) -> DatasetInfo:
    """Write a labelled copy, or finish one that was interrupted (`owl.data.jobs.run`).

    An episode with a damaged member ends before it, with a warning.

    Args:
        source: The dataset to label, any fsspec URL.
        directory: Local folder for the copy.
        labeller: Predicts the controls.
        workers: Processes, each with the network; 0 labels in this one.

    Returns:
        The description of the finished dataset.

    Raises:
        OwlError: As `run`; or the source has controls or no pictures.
    """
    return run(_AnnotateJob(source, labeller), local_folder(directory), workers)


class _AnnotateJob(ShardJob):
    """A copy with the same division into shards as its source."""

    doing, kinds = "annotating", ("annotated",)

    def __init__(self, source: str, labeller: Labeller) -> None:
        stored = DatasetInfo.load(source).modalities
        if "controls" in stored or "rgb" not in stored:
            raise OwlError(
                "dataset.modalities",
                f"{source} holds {', '.join(stored)}, expected a dataset with rgb and without controls; give "
                "footage without controls",
            )
        self._original, self._labeller = Source.open(source, ["rgb"], stored, labeller.network.size), labeller
        self.shards = self._original.index.frames_of_shards()
        controls = {
            "extension": EXTENSION,
            "buttons": labeller.network.buttons,
            "axes": labeller.network.axes,
            "labelled_by": {"checkpoint": labeller.checkpoint, "fingerprint": labeller.fingerprint},
            "timing": "frame t holds the controls that brought frame t about from frame t-1, as read from the frames",
        }
        origin = self._original.info.source
        self.info = self._original.derive("annotated", {**stored, "controls": controls}, source=origin)

    def settings(self, info: DatasetInfo) -> dict[str, Any]:
        labelled_by = info.modalities["controls"]["labelled_by"]
        return {
            "source": Made(info.source["identity"], info.source["path"]),
            "checkpoint": Made(labelled_by["fingerprint"], labelled_by["checkpoint"]),
        }

    def prepare(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def frames(self, number: int) -> Frames:
        index, reader = self._original.index, SampleReader(self._original)
        for episode in index.episodes_of(number):
            for sample, kept in reader.stretches(episode, int(index.episode_frames[episode])):
                pictures = np.ascontiguousarray(sample["rgb"].movedim(1, -1).numpy())
                for members, label in zip(kept, self._labeller.label(pictures), strict=True):
                    controls = codecs.encode_array(label.astype(np.float32))
                    yield str(index.episodes[episode]), {**members, EXTENSION: controls}
