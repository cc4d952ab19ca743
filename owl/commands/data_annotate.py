"""``python -m owl data annotate``: footage without controls becomes footage with controls read from its frames."""

import errno
import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from owl import models
from owl.data import codecs
from owl.data.reader import ShardReader, damage, read_members
from owl.data.scan import write_index
from owl.data.shards import (
    INDEX_NAME,
    DatasetInfo,
    ShardIndex,
    ShardWriter,
    begin_dataset,
    shard_name,
    writing,
)
from owl.data.storage import open_filesystem
from owl.errors import OwlError
from owl.models.inverse_dynamics import AFTER, BEFORE, InverseDynamicsModel
from owl.nn.placement import placement
from owl.version import code_version

EXTENSION = "controls.npy"
FRAMES = 64  # read by the network together


def main(source: str, directory: str, *, controls: str) -> None:
    """Read the player's controls from a dataset's frames and write a copy of the dataset that has them.

    All other members are copied byte for byte, and the splits stay. Train the network first, on footage of the same
    game and rate whose controls are known, frame by frame: experiments/inverse_dynamics_quickstart.yaml with
    --data.init_args.stride 1. A GPU is used where there is one.

    Killed or out of disk space? Run the same command again: it keeps the shards that are complete.

    Args:
        source: The dataset to label: a folder, or any fsspec URL.
        directory: Local folder for the copy; made where needed.
        controls: A .ckpt file of the recipe owl.recipes.inverse_dynamics.InverseDynamics.
    """
    is_complete = (Path(directory) / INDEX_NAME).exists()
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)
        info = annotate(source, directory, Labeller.load(controls))
    frames = int(ShardIndex.load(directory).episode_frames.sum())
    complete = "is complete already and was left as it is: it " if is_complete else ""
    print(f"{directory} {complete}holds {frames:,} frames, {', '.join(info.modalities)}")
    print(f"look at it: python -m owl data inspect {shlex.quote(directory)}")


@dataclass(frozen=True)
class Labeller:
    """A network that reads controls, and where it comes from."""

    network: InverseDynamicsModel
    checkpoint: str
    fingerprint: str

    @classmethod
    def load(cls, checkpoint: str) -> "Labeller":
        """Rebuild the network of a checkpoint.

        Raises:
            OwlError: It is no checkpoint, of another network, or of one that was trained with a stride.
        """
        network, content = models.rebuild(checkpoint)
        if not isinstance(network, InverseDynamicsModel):
            raise OwlError(
                "network.kind",
                f"the network of {checkpoint} is {type(network).__qualname__}, which does not read controls; give a "
                "checkpoint of the recipe owl.recipes.inverse_dynamics.InverseDynamics",
            )
        stride = content["owl"]["config"]["data"]["init_args"].get("stride", 1)
        if stride != 1:
            raise OwlError(
                "network.stride",
                f"the network of {checkpoint} was trained with stride {stride}, a stride of 1 was expected, since "
                "every frame is to be labelled; train one with --data.init_args.stride 1",
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(network.to(device), checkpoint, models.fingerprint(network))

    def label(self, frames: np.ndarray) -> np.ndarray:
        """Controls of a whole episode.

        Args:
            frames: uint8[T, h, w, 3], at the network's size.

        Returns:
            float32[T, buttons + axes]; those of frame 0 are 0.
        """
        device = placement(self.network).device
        parts = []
        for first in range(0, len(frames), FRAMES):
            begin = max(0, first - BEFORE)  # with the neighbours that the network looks at
            video = torch.from_numpy(frames[begin : first + FRAMES + AFTER]).to(device).movedim(-1, 1)
            buttons, axes = self.network.label(video[None].float() / 127.5 - 1)
            parts.append(torch.cat([buttons, axes], -1)[0, first - begin :][:FRAMES].cpu().numpy())
        return np.concatenate(parts)


def annotate(source: str, directory: str | Path, labeller: Labeller) -> DatasetInfo:
    """Write a labelled copy, or finish one that was interrupted; a finished one is left as it is.

    An episode with a damaged member ends before it, with a warning.

    Args:
        source: The dataset to label, any fsspec URL.
        directory: Local folder for the copy.
        labeller: Reads the controls.

    Returns:
        The description of the finished dataset.

    Raises:
        OwlError: The source has controls or no pictures, the folder was begun otherwise, is being written by another
            process or cannot be written. Complete shards stay, and the same call goes on from there.
    """
    filesystem, folder = open_filesystem(directory)
    if not isinstance(filesystem, LocalFileSystem):
        raise OwlError(
            "dataset.not-local",
            f"{directory} is not a local folder; write into one and copy the dataset there afterwards",
        )
    original, index = DatasetInfo.load(source), ShardIndex.load(source)
    if "controls" in original.modalities or "rgb" not in original.modalities:
        raise OwlError(
            "dataset.modalities",
            f"{source} holds {', '.join(original.modalities)}, a dataset with rgb and without controls was expected; "
            "give footage that has none",
        )
    identity, root = original.identity(index), Path(folder)
    try:
        info = _begin(root, _describe(source, original, identity, labeller))
        with writing(root):
            if not (root / INDEX_NAME).exists():
                _write(root, original, index, ShardReader(source, None, identity), labeller)
                write_index(root)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise OwlError(
            "dataset.unwritable",
            f"{directory} cannot be written ({error.strerror}); {'make room' if full else 'give another folder'}, then "
            "run the same command again: it goes on where it stopped",
        ) from error
    return info


def _describe(source: str, original: DatasetInfo, identity: str, labeller: Labeller) -> DatasetInfo:
    labelled_by = {"checkpoint": labeller.checkpoint, "fingerprint": labeller.fingerprint}
    controls = {
        "extension": EXTENSION,
        "buttons": labeller.network.buttons,
        "axes": labeller.network.axes,
        "labelled_by": labelled_by,
        "timing": "frame t holds the controls that brought frame t about from frame t-1, as read from the frames",
    }
    return DatasetInfo(
        fps=original.fps,
        size=original.size,
        modalities={**original.modalities, "controls": controls},
        splits=original.splits,
        source={"kind": "annotated", "path": source, "identity": identity, "source": original.source},
        code_version=code_version(),
    )


def _begin(root: Path, info: DatasetInfo) -> DatasetInfo:
    """Write ``dataset.json``, or check that the one there was begun with the same source and network.

    Raises:
        OwlError: It was not, or shards lie there that belong to no dataset.
    """
    begun = begin_dataset(root, info)
    if begun.source.get("kind") != "annotated":
        raise OwlError(
            "dataset.occupied",
            f"{root} holds a dataset of kind {begun.source.get('kind')}, an empty folder or one that this command "
            "began was expected; give another folder",
        )
    before, now = (d.modalities["controls"]["labelled_by"] for d in (begun, info))
    for what, old, new, key, place in (
        ("source", begun.source, info.source, "identity", "path"),
        ("checkpoint", before, now, "fingerprint", "checkpoint"),
    ):
        if old[key] != new[key]:
            raise OwlError(
                "dataset.other-settings",
                f"{root} was begun with {what} {old[place]} ({old[key]}), now it is {new[place]} ({new[key]}); run "
                f"with the same {what} as before, or give another folder",
            )
    return begun


def _write(root: Path, original: DatasetInfo, index: ShardIndex, reader: ShardReader, labeller: Labeller) -> None:
    """Write the shards that are missing, each as its original is divided."""
    with tqdm(total=int(index.episode_frames.sum()), unit="frame", desc="annotate") as progress:
        for number in index.shards.tolist():
            episodes = np.flatnonzero(index.episode_shard == number)
            episodes = episodes[np.argsort(index.episode_row[episodes])]
            if (root / shard_name(number)).exists():
                progress.update(int(index.episode_frames[episodes].sum()))
                continue
            with ShardWriter(root, number) as writer:
                for episode in episodes.tolist():
                    members, frames = _read(original, index, reader, episode, labeller.network.size)
                    if members:
                        labels = labeller.label(np.stack(frames)).astype(np.float32)
                        for frame, (others, label) in enumerate(zip(members, labels, strict=True)):
                            contents = {**others, EXTENSION: codecs.encode_array(label)}
                            writer.write(str(index.episodes[episode]), frame, contents)
                    progress.update(int(index.episode_frames[episode]))


def _read(
    original: DatasetInfo, index: ShardIndex, reader: ShardReader, episode: int, size: tuple[int, int]
) -> tuple[list[dict[str, bytes]], list[np.ndarray]]:
    """An episode's members by extension, and its pictures uint8[h, w, 3], up to the first damaged member."""
    extension = original.modalities["rgb"]["extension"]
    every = range(int(index.episode_frames[episode]))
    members, wrong = read_members(reader, index, episode, every, index.extensions.tolist())
    frames: list[np.ndarray] = []
    for found in members:
        try:
            if extension not in found:
                raise ValueError(f"it has no {extension}")
            frames.append(codecs.decode_rgb(found[extension], size))
        except ValueError as error:
            wrong = damage(index, episode, len(frames), error)
            break
    if wrong is not None:
        warnings.warn(f"{reader.url}: {wrong}; the episode ends before it", stacklevel=2)
    return members[: len(frames)], frames
