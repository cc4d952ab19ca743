"""Which JPEG decoder? Frames per second of each, as ratios to OpenCV's, at full and at reduced scale, one thread.

python benchmarks/jpeg.py
"""

import io
import time
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
import torch
import torchvision
from PIL import Image

from owl.data import codecs

SIZE = (360, 640)
REDUCED = (96, 160)
FRAMES = 32
ROUNDS = 7


def game_like_frames(count: int, size: tuple[int, int]) -> list[np.ndarray]:
    """uint8[H, W, 3] frames with the smooth areas, edges and fine texture of a rendered scene, about 85 kB as JPEG."""
    rng = np.random.default_rng(0)
    height, width = size
    frames = []
    for _ in range(count):
        # contours in brightness, soft colour: textures of one tint under coloured light
        blocks = rng.integers(0, 256, (height // 10, width // 10), dtype=np.uint8)
        walls = cv2.resize(blocks, (width, height), interpolation=cv2.INTER_NEAREST)[..., None]
        light = rng.integers(0, 256, (height // 90, width // 80, 3), dtype=np.uint8)
        shade = cv2.resize(light, (width, height), interpolation=cv2.INTER_CUBIC)
        grain = rng.normal(0, 4, (height, width, 1))
        frames.append(np.clip(0.5 * walls + 0.5 * shade + grain, 0, 255).astype(np.uint8))
    return frames


def with_pillow(data: bytes, size: tuple[int, int] | None) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    if size is not None:
        image.draft("RGB", (size[1], size[0]))
    return codecs.resize(np.asarray(image), size) if size is not None else np.asarray(image)


def with_opencv(data: bytes, size: tuple[int, int] | None) -> np.ndarray:
    mode = cv2.IMREAD_COLOR_RGB if size is None else cv2.IMREAD_REDUCED_COLOR_2
    image = cv2.imdecode(np.frombuffer(data, np.uint8), mode)
    return codecs.resize(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), size) if size is not None else image


def with_torchvision(data: bytes, size: tuple[int, int] | None) -> np.ndarray:
    image = torchvision.io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    rgb = image.permute(1, 2, 0).numpy()
    return codecs.resize(rgb, size) if size is not None else rgb


def with_simplejpeg(data: bytes, size: tuple[int, int] | None) -> np.ndarray:
    return codecs.decode_rgb(data, size)


def with_simplejpeg_fast(data: bytes, size: tuple[int, int] | None) -> np.ndarray:
    scale = {} if size is None else {"min_height": SIZE[0] // 2, "min_width": SIZE[1] // 2}
    rgb = simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, fastupsample=True, **scale)
    return codecs.resize(rgb, size) if size is not None else rgb


DECODERS: dict[str, Callable[[bytes, tuple[int, int] | None], np.ndarray]] = {
    "cv2 (baseline)": with_opencv,
    "PIL": with_pillow,
    "torchvision.io": with_torchvision,
    "simplejpeg (used by owl)": with_simplejpeg,
    "simplejpeg, fast DCT and upsampling": with_simplejpeg_fast,
}


def seconds(
    decode: Callable[[bytes, tuple[int, int] | None], np.ndarray], data: list[bytes], size: tuple[int, int] | None
) -> float:
    begin = time.perf_counter()
    for item in data:
        decode(item, size)
    return (time.perf_counter() - begin) / len(data)


def main() -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    frames = game_like_frames(FRAMES, SIZE)
    data = [codecs.encode_rgb(frame) for frame in frames]
    print(
        f"{FRAMES} JPEGs of {SIZE[0]}x{SIZE[1]}, quality 95, 4:2:0, {np.mean([len(d) for d in data]) / 1e3:.0f} kB each"
    )
    for title, size in (("full scale", None), (f"reduced to {REDUCED[0]}x{REDUCED[1]}", REDUCED)):
        best = dict.fromkeys(DECODERS, float("inf"))
        for _ in range(ROUNDS):  # taken in turns, so that a busy moment of the machine hits all alike
            for name, decode in DECODERS.items():
                best[name] = min(best[name], seconds(decode, data, size))
        exact = [frame if size is None else codecs.resize(frame, size) for frame in frames]
        print(f"\n{title}")
        for name, decode in DECODERS.items():
            errors = [np.mean((decode(d, size).astype(float) - e) ** 2) for d, e in zip(data, exact, strict=True)]
            ratio, quality = best["cv2 (baseline)"] / best[name], 10 * np.log10(255**2 / np.mean(errors))
            print(f"  {name:38} {1 / best[name]:7.0f} frames/s  {ratio:5.2f}x  {quality:5.2f} dB")


if __name__ == "__main__":
    main()
