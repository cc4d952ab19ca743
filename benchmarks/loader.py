"""OWL's loader against webdataset and litdata: the same JPEG frames, windows of 8 at 360x640, decoded, shuffled.

    python -m benchmarks.loader [--windows 96] [--epochs 10] [--workers 2]

Each library reads its own layout of the same bytes from local disk through a torch DataLoader with the same workers and
batches. webdataset runs twice: with its own decoder (PIL) and with the JPEG decoder that OWL uses. The libraries take
turns, one epoch each, so that a busy moment of the machine hits all alike; figures are medians over epochs. CPU time is
that of the workers and the main process together: on a machine with other work to do it says more than the rate.
"""

import argparse
import gc
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

import cv2
import numpy as np
import psutil
import simplejpeg
import torch
import webdataset
from litdata import StreamingDataLoader, StreamingDataset
from litdata.streaming.writer import BinaryWriter
from PIL import Image

from benchmarks.jpeg import game_like_frames
from owl.data import codecs
from owl.data.loader import GlobalBatches, ResumableLoader, single_threaded
from owl.data.scan import write_index
from owl.data.shards import DatasetInfo, ShardWriter
from owl.data.windows import WindowDataset

LENGTH, SIZE, BATCH = 8, (360, 640), 4
SHARDS = 8  # every library gets as many files


def write_datasets(root: Path, windows: int) -> None:
    """Write the same frames as OWL shards, as webdataset tars and as litdata chunks."""
    distinct = [codecs.encode_rgb(frame) for frame in game_like_frames(64, SIZE)]
    samples = [[distinct[(window * 5 + t) % len(distinct)] for t in range(LENGTH)] for window in range(windows)]
    per_shard = windows // SHARDS
    episodes = [f"episode-{shard}" for shard in range(SHARDS)]
    DatasetInfo(35.0, SIZE, {"rgb": {"extension": "rgb.jpg"}}, {"train": episodes}, {}, "benchmark").save(root / "owl")
    (root / "webdataset").mkdir()
    for shard, episode in enumerate(episodes):
        part = samples[shard * per_shard : (shard + 1) * per_shard]
        with ShardWriter(root / "owl", shard) as writer:
            for frame, jpeg in enumerate(jpeg for sample in part for jpeg in sample):
                writer.write(episode, frame, {"rgb.jpg": jpeg})
        with webdataset.TarWriter(str(root / "webdataset" / f"{shard:06d}.tar")) as tar:
            for number, sample in enumerate(part):
                members = {f"{t}.jpg": jpeg for t, jpeg in enumerate(sample)}
                tar.write({"__key__": f"{shard:03d}{number:06d}", **members})
    write_index(root / "owl")
    (root / "litdata").mkdir()
    writer = BinaryWriter(str(root / "litdata"), chunk_size=per_shard)
    for number, sample in enumerate(samples):
        writer[number] = {str(t): jpeg for t, jpeg in enumerate(sample)}
    writer.done()
    writer.merge()


def stack(frames: Iterable[np.ndarray]) -> torch.Tensor:
    """uint8[T, 3, H, W] from decoded frames, by OpenCV's split, the fastest way to planes."""
    rgb = np.empty((LENGTH, 3, *SIZE), np.uint8)
    for planes, frame in zip(rgb, frames, strict=True):
        cv2.split(frame, list(planes))
    return torch.from_numpy(rgb)


def with_pillow(jpegs: list[bytes]) -> torch.Tensor:
    return stack(np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs)


def with_simplejpeg(jpegs: list[bytes]) -> torch.Tensor:
    return stack(simplejpeg.decode_jpeg(jpeg) for jpeg in jpegs)


class LitdataWindows(StreamingDataset):
    """litdata's dataset of windows, decoded as OWL decodes."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        sample = super().__getitem__(index)
        return with_simplejpeg([sample[str(t)] for t in range(LENGTH)])


def owl_loader(root: Path, workers: int) -> Iterable:
    dataset = WindowDataset(root / "owl", length=LENGTH, hop=LENGTH)
    return ResumableLoader(dataset, GlobalBatches(dataset, BATCH), workers)


def webdataset_loader(root: Path, workers: int, decode: Callable[[list[bytes]], torch.Tensor]) -> Iterable:
    tars = sorted(str(path) for path in (root / "webdataset").glob("*.tar"))
    dataset = webdataset.WebDataset(tars, shardshuffle=SHARDS, empty_check=False).shuffle(32)
    dataset = dataset.map(lambda sample: decode([sample[f"{t}.jpg"] for t in range(LENGTH)]))
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=BATCH,
        num_workers=workers,
        persistent_workers=True,
        worker_init_fn=single_threaded,
        drop_last=True,
    )


def litdata_loader(root: Path, workers: int) -> Iterable:
    dataset = LitdataWindows(str(root / "litdata"), shuffle=True, drop_last=True)
    return StreamingDataLoader(
        dataset,
        batch_size=BATCH,
        num_workers=workers,
        persistent_workers=True,
        worker_init_fn=single_threaded,
        multiprocessing_context=multiprocessing.get_context("fork"),
    )


def children() -> set[int]:
    """Ids of the processes that this one has started, and of those that they have."""
    return {process.pid for process in psutil.Process().children(recursive=True)}


def cpu_seconds(processes: set[int]) -> float:
    """CPU time that these processes have used so far."""
    times = [psutil.Process(pid).cpu_times() for pid in processes]
    return sum(t.user + t.system for t in times)


def unshared_mebibytes(processes: set[int]) -> float:
    """Memory that these processes do not share."""
    return sum(psutil.Process(pid).memory_full_info().uss for pid in processes) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_datasets(root, options.windows)
        makers: dict[str, Callable[[], Iterable]] = {
            "owl": lambda: owl_loader(root, options.workers),
            "webdataset, its decoder": lambda: webdataset_loader(root, options.workers, with_pillow),
            "webdataset, owl's decoder": lambda: webdataset_loader(root, options.workers, with_simplejpeg),
            "litdata, owl's decoder": lambda: litdata_loader(root, options.workers),
        }
        rates: dict[str, list[float]] = {name: [] for name in makers}
        first: dict[str, float] = {}
        for name, make in makers.items():  # a fresh loader each, before any other has workers
            begin = time.perf_counter()
            next(iter(make()))
            first[name] = time.perf_counter() - begin
            gc.collect()  # its iterator is a cycle, which a worker that is forked later would try to shut down
        loaders = {name: make() for name, make in makers.items()}
        workers: dict[str, set[int]] = {}
        memory: dict[str, list[float]] = {name: [] for name in makers}
        main_memory = []
        cpu: dict[str, list[float]] = {name: [] for name in makers}
        for _ in range(options.epochs):
            for name, loader in loaders.items():
                before = children()
                cpu_before = cpu_seconds({os.getpid()} | (workers.get(name, set()) & before))
                begin = time.perf_counter()
                windows = sum(len(batch["rgb"] if isinstance(batch, dict) else batch) for batch in loader)
                rates[name].append(windows / (time.perf_counter() - begin))
                workers.setdefault(name, children() - before)  # persistent: started in the first epoch
                alive = workers[name] & children()
                cpu[name].append((cpu_seconds({os.getpid()} | alive) - cpu_before) / windows)
                memory[name].append(unshared_mebibytes(alive))
            main_memory.append(unshared_mebibytes({os.getpid()}))
        others = [name for name in makers if name != "owl"]
        ratio = {n: statistics.median(a / b for a, b in zip(rates["owl"], rates[n], strict=True)) for n in makers}
        spent = {name: statistics.median(values) * 1e3 for name, values in cpu.items()}
        print(f"\nwindows of {LENGTH} frames {SIZE[0]}x{SIZE[1]}, batches of {BATCH}, {options.workers} workers")
        for name, values in rates.items():
            print(
                f"  {name:26} {statistics.median(values):6.1f} windows/s  owl is {ratio[name]:4.2f}x"
                f"   CPU {spent[name]:5.1f} ms a window, owl is {spent[name] / spent['owl']:4.2f}x"
                f"   first batch {first[name]:4.2f} s"
            )
        print(
            f"owl / best of the others: {min(ratio[n] for n in others):.2f}x by the clock, "
            f"{min(spent[n] for n in others) / spent['owl']:.2f}x by CPU time"
        )
        print(f"memory in MiB after epochs 1 to {options.epochs}, without what is shared:")
        for name, values in {**{f"workers of {n}": m for n, m in memory.items()}, "main process": main_memory}.items():
            print(f"  {name:38}" + "".join(f" {value:4.0f}" for value in values))


if __name__ == "__main__":
    main()
