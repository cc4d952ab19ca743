"""Tiny datasets for tests: one with every modality, of patterns that move smoothly, and one of numbered frames."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from owl.data import codecs
from owl.data.scan import write_index
from owl.data.shards import DatasetInfo, ShardIndex, ShardWriter, shard_name

FPS = 35.0
SAMPLE_RATE = 44_100
DOWNSCALE = 2  # of the flow's grid
BUTTONS = ["ATTACK", "MOVE_LEFT", "MOVE_RIGHT"]
AXES = ["mouse_x", "mouse_y"]
DESCRIPTIONS: dict[str, dict] = {
    "rgb": {"extension": "rgb.jpg", "quality": 95},
    "depth": {"extension": "depth.png", "encoding": "uint8", "unit": "map units", "step": 7.143, "offset": 1.2},
    "flow": {
        "extension": "flow.png",
        "encoding": "kitti-uint16",
        "downscale": DOWNSCALE,
        "unit": "pixels of the stored rgb frame",
        "scale": 0.1,
        "direction": "frame[t-1](x + flow) ~ frame[t](x)",
    },
    "audio": {"extension": "audio.npy", "sample_rate": SAMPLE_RATE, "channels": 2},
    "controls": {
        "extension": "controls.npy",
        "buttons": BUTTONS,
        "axes": AXES,
        "mirror": {"buttons": {"MOVE_LEFT": "MOVE_RIGHT", "MOVE_RIGHT": "MOVE_LEFT"}, "axes": ["mouse_x"]},
    },
}


def render(episode: int, frames: int, size: tuple[int, int], seed: int = 0) -> dict[str, list[np.ndarray]]:
    """One episode: a texture that slides by a constant whole number of flow-grid pixels, steered by its controls.

    Returns:
        Per modality one array a frame, as the codecs take them; the flow is exact.
    """
    rng = np.random.default_rng((seed, episode))
    height, width = size
    velocity = rng.choice([-2, -1, 1, 2], 2)  # (dx, dy) of the camera, pixels a frame
    phase, wave = rng.uniform(0, 2 * np.pi, 3), rng.uniform(0.5, 1.5, (3, 2)) * 2 * np.pi / min(size)
    tone = rng.uniform(200, 800)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    grid = (height // DOWNSCALE, width // DOWNSCALE)
    episode_arrays: dict[str, list[np.ndarray]] = {name: [] for name in DESCRIPTIONS}
    samples = SAMPLE_RATE / FPS
    for frame in range(frames):
        # the camera moves by `velocity`, so a point seen at p now was at p + velocity a frame ago
        u, v = x + frame * velocity[0], y + frame * velocity[1]
        waves = [np.sin(wave[c, 0] * u + phase[c]) * np.cos(wave[c, 1] * v) for c in range(3)]
        episode_arrays["rgb"].append(np.stack([127.5 + 100 * plane for plane in waves], -1).astype(np.uint8))
        episode_arrays["depth"].append((127.5 + 100 * waves[0]).astype(np.uint8))
        motion = velocity if frame else np.zeros(2)
        episode_arrays["flow"].append(np.broadcast_to(motion, (*grid, 2)).astype(np.float32))
        time = np.arange(round(frame * samples), round((frame + 1) * samples)) / SAMPLE_RATE
        left = np.sin(2 * np.pi * tone * time)
        episode_arrays["audio"].append((np.stack([left, left / 2], -1) * 20_000).astype(np.int16))
        buttons = [float(frame % 5 == 0), float(velocity[0] < 0), float(velocity[0] > 0)]
        episode_arrays["controls"].append(np.array([*buttons, *velocity], np.float32))
    return episode_arrays


def encode(modality: str, array: np.ndarray) -> bytes:
    """The bytes of one member."""
    encoders = {"rgb": codecs.encode_rgb, "depth": codecs.encode_depth, "flow": codecs.encode_flow}
    return encoders.get(modality, codecs.encode_array)(array)


def make_dataset(
    root: str | Path,
    episodes: int = 4,
    frames: int = 12,
    size: tuple[int, int] = (24, 40),
    modalities: Sequence[str] = ("rgb", "depth", "flow", "audio", "controls"),
    seed: int = 0,
) -> Path:
    """Write a finished dataset, one episode a shard; the last two episodes are "validation" and "test".

    With fewer than three episodes all splits name the same ones.
    """
    names = [f"episode-{number:03d}" for number in range(episodes)]
    train, validation, test = (names[:-2], names[-2:-1], names[-1:]) if episodes >= 3 else (names, names, names)
    DatasetInfo(
        fps=FPS,
        size=size,
        modalities={name: DESCRIPTIONS[name] for name in modalities},
        splits={"train": train, "validation": validation, "test": test},
        source={"kind": "synthetic", "seed": seed},
        code_version="test",
    ).save(root)
    for number, name in enumerate(names):
        arrays = render(number, frames, size, seed)
        with ShardWriter(root, number) as writer:
            for frame in range(frames):
                members = {DESCRIPTIONS[m]["extension"]: encode(m, arrays[m][frame]) for m in modalities}
                writer.write(name, frame, members)
    write_index(root)
    return Path(root)


def make_numbered(root: Path, lengths: Sequence[int]) -> Path:
    """Episodes of any lengths, two a shard, whose first axis is the frame's number."""
    names = [f"e{number}" for number in range(len(lengths))]
    controls = {**DESCRIPTIONS["controls"], "buttons": ["even"], "axes": ["frame", "one"]}
    DatasetInfo(30.0, (24, 40), {"controls": controls}, {"train": names}, {}, "test").save(root)
    for shard in range(0, len(lengths), 2):
        with ShardWriter(root, shard // 2) as writer:
            for name, frames in zip(names[shard : shard + 2], lengths[shard : shard + 2], strict=True):
                for frame in range(frames):
                    array = np.array([frame % 2 == 0, frame, 1], np.float32)
                    writer.write(name, frame, {"controls.npy": codecs.encode_array(array)})
    write_index(root)
    return root


def overwrite(root: Path, index: ShardIndex, episode: int, frame: int, extension: str, content: bytes) -> None:
    """Damage the middle of a member."""
    row, column = int(index.episode_row[episode]) + frame, index.extensions.tolist().index(extension)
    with open(root / shard_name(int(index.episode_shard[episode])), "r+b") as file:
        file.seek(int(index.offsets[row, column]) + int(index.sizes[row, column]) // 2)
        file.write(content)


def pack_again(dataset: Path, *options: str, names: list[str] | None = None, before: str = "") -> None:
    """Unpack every shard and pack it again, as one does with tar."""
    for shard in dataset.glob("shard-*.tar"):
        folder = shard.with_suffix("")
        folder.mkdir()
        subprocess.run(["tar", "xf", shard, "-C", folder], check=True)
        if before:
            subprocess.run(["bash", "-ec", before], cwd=folder, check=True)
        subprocess.run(["tar", "cf", shard, *options, "-C", folder, *(names or ["."])], check=True)
        subprocess.run(["rm", "-r", folder], check=True)
