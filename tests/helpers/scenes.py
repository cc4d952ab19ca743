"""Depth and cameras of each episode of a dataset, as MegaSAM writes them."""

from pathlib import Path
from typing import Any

import numpy as np

from owl.data.shards import ShardIndex


def save_scenes(folder: str | Path, dataset: str | Path, seed: int = 0, **changed: Any) -> dict[str, dict[str, Any]]:
    """Write ``<episode>.npz`` for every episode, with depth maps of 12x20, and return what they hold.

    Args:
        folder: Where to.
        dataset: A finished dataset.
        seed: Of the numbers.
        changed: Arrays in place of those of every file; None leaves the key out.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    rng, index, written = np.random.default_rng(seed), ShardIndex.load(dataset), {}
    for name, frames in zip(index.episodes.tolist(), index.episode_frames.tolist(), strict=True):
        depths = rng.uniform(1, 5, (frames, 1, 1)).repeat(12, 1).repeat(20, 2).astype(np.float32)
        depths[:, 0, 0] = 0
        cameras = np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))
        cameras[:, :3, 3] = np.arange(frames)[:, None] * [0.1, 0, 0.2]
        scene: dict[str, Any] = {
            "images": np.zeros((frames, 12, 20, 3), np.uint8),
            "depths": depths,
            "intrinsic": np.array([[12.0, 0, 10], [0, 11, 6], [0, 0, 1]], np.float32),
            "cam_c2w": cameras,
        } | changed
        written[name] = {key: array for key, array in scene.items() if array is not None}
        np.savez(Path(folder) / f"{name}.npz", **written[name])
    return written
