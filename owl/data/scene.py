"""Depth and cameras of films, as MegaSAM estimates them (Li et al. 2024, arXiv:2412.04463): one .npz an episode."""

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from owl.data.annotators import Annotator, depth_levels, depth_scale, stored_scale
from owl.data.modalities.camera import Camera
from owl.data.modalities.depth import Depth
from owl.data.source import Source
from owl.errors import OwlError
from owl.spacing import evenly_spaced

KEYS = ("depths", "intrinsic", "cam_c2w")
SAMPLED = 16
"""Episodes from which the range of depth is taken, and frames of each."""


class SceneAnnotator(Annotator):
    """Depth and camera of every frame, read from ``<folder>/<episode>.npz``.

    Keys are those of MegaSAM: ``depths`` float[T, h, w], distances along the viewing direction in an unknown unit, 0
    where there is none; ``intrinsic`` float[3, 3] in pixels of the depth maps; ``cam_c2w`` float[T, 4, 4], camera to
    world, x right, y down, z forward.

    Args:
        folder: The folder.
        scale: ``step``, ``offset`` and ``inverse`` of the dataset; see `of`.
        identity: Hash of the files.
    """

    def __init__(self, folder: str, scale: dict[str, Any], identity: str) -> None:
        self.folder, self.scale, self.identity = folder, scale, identity
        made_by = {"path": folder, "identity": identity}
        depth = {"extension": Depth.extension, "encoding": "uint8", "unit": "inverse distance, relative"}
        self.modalities = {
            "depth": {**depth, **scale, "made_by": made_by},
            "camera": {**Camera.describe(), "made_by": made_by},
        }

    @classmethod
    def of(cls, folder: str, source: Source, existing: dict[str, Any] | None) -> "SceneAnnotator":
        """Check that there is a file for every episode, and choose the range from evenly spaced frames.

        Args:
            folder: The folder.
            source: The dataset.
            existing: Description of depth in an interrupted copy, whose range is kept; None for a new copy.

        Raises:
            OwlError: A file is missing or damaged, lacks a key, or has another number of frames than its episode.
        """
        episodes = [str(name) for name in source.index.episodes]
        digest = hashlib.sha256()
        for name in episodes:
            digest.update(repr((name, _checksums(folder, name))).encode())
        identity = digest.hexdigest()[:16]
        if (scale := stored_scale(existing)) is not None:
            return cls(folder, scale, identity)
        samples = []
        for episode in evenly_spaced(len(episodes), SAMPLED):
            depths = read_scene(folder, episodes[episode], int(source.index.episode_frames[episode]))["depths"]
            samples.append(_inverse(depths[evenly_spaced(len(depths), SAMPLED)]).ravel())
        return cls(folder, depth_scale(np.concatenate(samples), folder), identity)

    def members(self, source: Source, episode: int) -> Iterator[dict[str, bytes]]:
        scene = read_scene(self.folder, str(source.index.episodes[episode]), int(source.index.episode_frames[episode]))
        height, width = source.info.size
        depths, intrinsic = scene["depths"], scene["intrinsic"]
        across, down = width / depths.shape[2], height / depths.shape[1]
        lens = np.array(
            [intrinsic[0, 0] * across, intrinsic[1, 1] * down, intrinsic[0, 2] * across, intrinsic[1, 2] * down]
        )
        for depth, camera in zip(depths, scene["cam_c2w"], strict=True):
            levels = depth_levels(_inverse(depth), self.scale["step"], self.scale["offset"], source.info.size)
            values = np.concatenate([camera[:3].ravel(), lens]).astype(np.float32)
            yield {Depth.extension: Depth.encode(levels), Camera.extension: Camera.encode(values)}


def read_scene(folder: str, episode: str, frames: int) -> dict[str, np.ndarray]:
    """Read the depth and the cameras of an episode.

    Returns:
        ``depths``, ``intrinsic`` and ``cam_c2w``, see `SceneAnnotator`.

    Raises:
        OwlError: The file lacks a key, or an array has another shape than the episode needs.
    """
    path = Path(folder) / f"{episode}.npz"
    with np.load(path, allow_pickle=False) as file:
        scene = {key: np.asarray(file[key], np.float64) for key in KEYS}
    shapes = {key: array.shape for key, array in scene.items()}
    expected = {"depths": (frames, *shapes["depths"][1:3]), "intrinsic": (3, 3), "cam_c2w": (frames, 4, 4)}
    for key, shape in shapes.items():
        if shape != expected[key] or len(shapes["depths"]) != 3:
            raise OwlError(
                "scene.shape",
                f"{key} of {path} has shape {list(shape)}, expected {list(expected[key])} for an episode of {frames} "
                "frames; run the estimation on the frames of this dataset",
            )
    if not (np.isfinite(scene["cam_c2w"]).all() and np.isfinite(scene["intrinsic"]).all()):
        raise OwlError("scene.non-finite", f"{path} has a camera with NaN or infinity, expected numbers; make it again")
    return scene


def _checksums(folder: str, episode: str) -> list[tuple[str, int]]:
    path = Path(folder) / f"{episode}.npz"
    try:
        with zipfile.ZipFile(path) as archive:
            found = {entry.filename.removesuffix(".npy"): entry.CRC for entry in archive.infolist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise OwlError(
            "scene.missing",
            f"{path} cannot be read ({error}), expected the depth and cameras of episode {episode}; write an .npz of "
            f"MegaSAM with {', '.join(KEYS)} for every episode",
        ) from error
    if missing := [key for key in KEYS if key not in found]:
        raise OwlError(
            "scene.missing",
            f"{path} has no {' and no '.join(missing)}, it holds {', '.join(found)}; write an .npz of MegaSAM with "
            f"{', '.join(KEYS)} for every episode",
        )
    return [(key, found[key]) for key in KEYS]


def _inverse(depth: np.ndarray) -> np.ndarray:
    """Return inverse distances; NaN where the distance is not a number above 0."""
    known = np.isfinite(depth) & (depth > 0)
    return np.where(known, 1 / np.where(known, depth, 1), np.nan)
