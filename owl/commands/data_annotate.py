"""``python -m owl data annotate``: a copy of a dataset with controls, flow, depth or cameras made from its frames."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from owl import models
from owl.cli.datasets import print_dataset, printed_warnings
from owl.data import codecs
from owl.data.annotators import Annotator, FlowAnnotator, pictures
from owl.data.depth import DepthAnnotator
from owl.data.jobs import Frames, Made, ShardJob, local_folder, run
from owl.data.scene import SceneAnnotator
from owl.data.shards import INDEX_NAME, INFO_NAME, DatasetInfo
from owl.data.source import SampleReader, Source
from owl.errors import OwlError, at_least
from owl.hardware import default_device
from owl.models.inverse_dynamics import AFTER, BEFORE, InverseDynamicsModel
from owl.nn.placement import placement
from owl.pixels import to_float

EXTENSION = "controls.npy"
FRAMES = 64  # frames per batch of the network


def main(
    source: str,
    directory: str,
    *,
    controls: str | None = None,
    flow: Literal["dis", "raft"] | None = None,
    flow_weights: str | None = None,
    depth: str | None = None,
    scene: str | None = None,
    workers: int = 0,
) -> None:
    """Write a copy of a dataset with controls, optical flow, depth or cameras that are made from its frames.

    All other members are copied byte for byte, and the splits are unchanged. A GPU is used if there is one. Everything
    is read from local files.

    After an interruption or a full disk, run the same command again: complete shards are kept.

    Args:
        source: The dataset to annotate: a folder, or any fsspec URL.
        directory: Local folder for the copy; created if missing.
        controls: A .ckpt file of the recipe owl.recipes.inverse_dynamics.InverseDynamics, which predicts the player's
            controls. Train it first, on footage of the same game and frame rate with known controls, with stride 1:
            experiments/inverse_dynamics_quickstart.yaml with --data.init_args.stride 1.
        flow: Optical flow back to the previous frame, by OpenCV's DIS or by torchvision's RAFT.
        flow_weights: With --flow raft: file with the state_dict of torchvision's raft_large or raft_small.
        depth: Folder with a network of the package transformers that predicts the depth of single frames.
        scene: Folder with depth and cameras of each episode as <episode>.npz, as MegaSAM writes them.
        workers: Processes, each with a copy of the networks; 0 annotates in this process.
    """
    at_least(0, workers=workers)
    is_complete = (Path(directory) / INDEX_NAME).exists()
    with printed_warnings():
        annotators = find_annotators(source, directory, controls, flow, flow_weights, depth, scene)
        info = annotate(source, directory, annotators, workers)
    print_dataset(directory, f", {', '.join(info.modalities)}", is_complete)


def find_annotators(
    source: str,
    directory: str,
    controls: str | None,
    flow: str | None,
    flow_weights: str | None,
    depth: str | None,
    scene: str | None,
) -> list[Annotator]:
    """Load what the options of the command request; see `main`.

    Raises:
        OwlError: Nothing is requested, options exclude each other, the source has no rgb or has the modality already,
            or a network or a file cannot be used.
    """
    if not (controls or flow or depth or scene):
        raise OwlError(
            "arguments.missing-key",
            "nothing to annotate is given, expected --controls, --flow, --depth or --scene; set at least one",
        )
    if depth and scene:
        raise OwlError(
            "arguments.wrong-value", "--depth and --scene are set, and both add depth, expected one; leave one out"
        )
    if (flow == "raft") != (flow_weights is not None):
        raise OwlError(
            "flow.weights",
            f"--flow is {flow} and --flow_weights {flow_weights}, expected a file of weights with raft and none "
            "otherwise; RAFT is read from a local file, which --flow_weights names",
        )
    original = Source.open(source, (), ())
    wanted = {"controls": controls, "flow": flow, "depth": depth or scene, "camera": scene}
    check_lacks(original, [name for name, value in wanted.items() if value])
    existing = DatasetInfo.load(directory).modalities if (Path(directory) / INFO_NAME).exists() else {}
    annotators: list[Annotator] = []
    if controls is not None:
        annotators.append(Labeller.load(controls))
    if flow is not None:
        annotators.append(FlowAnnotator(original.info.size, flow_weights))
    if depth is not None:
        annotators.append(DepthAnnotator.of(depth, original, existing.get("depth")))
    if scene is not None:
        annotators.append(SceneAnnotator.of(scene, original, existing.get("depth")))
    return annotators


def check_lacks(source: Source, added: Sequence[str]) -> None:
    """Check that a dataset has rgb and lacks what is to be added.

    Raises:
        OwlError: It has no rgb, or one of the modalities.
    """
    stored = source.info.modalities
    present = [name for name in added if name in stored]
    if present or "rgb" not in stored:
        raise OwlError(
            "dataset.modalities",
            f"{source.url} holds {', '.join(stored)}, expected a dataset with rgb and without {' and '.join(added)}; "
            f"give footage without {' and '.join(present or added)}",
        )


@dataclass(frozen=True)
class Labeller(Annotator):
    """Controls, as an inverse dynamics model reads them from the frames."""

    network: InverseDynamicsModel
    checkpoint: str
    fingerprint: str

    @property
    def modalities(self) -> dict[str, dict[str, Any]]:  # type: ignore[override]
        """Description of the controls."""
        return {
            "controls": {
                "extension": EXTENSION,
                "buttons": self.network.buttons,
                "axes": self.network.axes,
                "labelled_by": {"checkpoint": self.checkpoint, "fingerprint": self.fingerprint},
                "timing": "frame t holds the controls that brought frame t about from frame t-1, as read from the "
                "frames",
            }
        }

    @staticmethod
    def made_by(description: dict[str, Any]) -> Made:
        return Made(description["labelled_by"]["fingerprint"], description["labelled_by"]["checkpoint"])

    def members(self, source: Source, episode: int) -> Iterator[dict[str, bytes]]:
        whole = int(source.index.episode_frames[episode])
        for frames in pictures(replace(source, size=self.network.size), episode, whole):
            for label in self.label(frames):
                yield {EXTENSION: codecs.encode_array(label.astype(np.float32))}

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
        return cls(network.to(default_device()), checkpoint, models.fingerprint(network))

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


def annotate(source: str, directory: str | Path, annotators: Sequence[Annotator], workers: int = 0) -> DatasetInfo:
    """Write an annotated copy, or finish one that was interrupted (`owl.data.jobs.run`).

    An episode with a damaged member ends before it, with a warning.

    Args:
        source: The dataset to annotate, any fsspec URL.
        directory: Local folder for the copy.
        annotators: Make the new members, in this order behind the old ones.
        workers: Processes, each with the annotators; 0 annotates in this one.

    Returns:
        The description of the finished dataset.

    Raises:
        OwlError: As `run`; or the source has no pictures, or has one of the new modalities.
    """
    return run(_AnnotateJob(source, annotators), local_folder(directory), workers)


class _AnnotateJob(ShardJob):
    """A copy with the same division into shards as its source."""

    doing, kinds = "annotating", ("annotated",)

    def __init__(self, source: str, annotators: Sequence[Annotator]) -> None:
        stored = DatasetInfo.load(source).modalities
        self._original, self._annotators = Source.open(source, (), stored), annotators
        self._maker = {name: annotator for annotator in annotators for name in annotator.modalities}
        check_lacks(self._original, list(self._maker))
        self.shards = self._original.index.frames_of_shards()
        added = {name: maker.modalities[name] for name, maker in self._maker.items()}
        self.info = self._original.derive("annotated", {**stored, **added}, source=self._original.info.source)

    def settings(self, info: DatasetInfo) -> dict[str, Any]:
        kept = [name for name in info.modalities if name not in self._maker]
        return {"source": Made(info.source["identity"], info.source["path"]), "modalities kept": ", ".join(kept)} | {
            name: maker.made_by(info.modalities[name]) for name, maker in self._maker.items() if name in info.modalities
        }

    def prepare(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def frames(self, number: int) -> Frames:
        index, reader = self._original.index, SampleReader(self._original)
        for episode in index.episodes_of(number):
            copied = chain.from_iterable(kept for _, kept in reader.stretches(episode, FRAMES))
            made = [annotator.members(self._original, episode) for annotator in self._annotators]
            for members in zip(copied, *made, strict=False):  # up to a damaged member
                yield (
                    str(index.episodes[episode]),
                    {name: content for part in members for name, content in part.items()},
                )
