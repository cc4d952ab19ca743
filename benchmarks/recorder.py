"""The recorder, with pictures, depth, flow, sound and controls, against the bare game.

    python -m benchmarks.recorder [--frames 3000] [--workers CORES] [--rounds 2]

The baseline is one process that plays the same game at the same size with depth and sound on, and drops every frame:
what drawing costs, with nothing computed, compressed or written. Both take turns, so that a busy moment of the machine
hits them alike; rates are the best round's. The last line divides by the processor time of all processes together:
what the recorder reaches on two otherwise idle cores.
"""

import argparse
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from owl.data import game
from owl.data.recorder import GameRecording, record_game

SIZES = {(96, 160): 300, (360, 640): 100}  # and the frames/s to reach on two cores


def processor_seconds() -> float:
    """Of this process and of all that it has waited for, the games among them."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in usage)


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    wall, processor = time.perf_counter(), processor_seconds()
    work()
    return time.perf_counter() - wall, processor_seconds() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=3000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    game.check_audio()
    with tempfile.TemporaryDirectory() as folder:
        for size, target in SIZES.items():
            path = Path(folder) / "dataset"

            def play(size: tuple[int, int] = size) -> None:
                for _ in game.play("deathmatch", options.frames // 3, size, buffers=("depth", "audio")):
                    pass

            def record(size: tuple[int, int] = size, path: Path = path) -> None:
                shutil.rmtree(path, ignore_errors=True)
                modalities = ("depth", "flow", "audio")
                recording = GameRecording(options.frames, size, modalities=modalities, workers=options.workers)
                record_game(str(path), recording)

            rounds = [(measure(play), measure(record)) for _ in range(options.rounds)]
            bare = max(options.frames // 3 / wall for (wall, _), _ in rounds)
            recorded = max(options.frames / wall for _, (wall, _) in rounds)
            efficient = max(options.frames / processor for _, (_, processor) in rounds)
            stored = sum(file.stat().st_size for file in path.iterdir()) / options.frames
            print(f"\n{size[0]}x{size[1]}, every modality, {options.workers} workers, {stored / 1000:.0f} kB a frame")
            print(f"  bare game, one process   {bare:6.0f} frames/s")
            print(
                f"  recorder, all included   {recorded:6.0f} frames/s   {recorded / bare:4.2f}x the bare game, "
                f"{recorded / target:4.2f}x the target of {target}"
            )
            print(f"  two cores to itself      {2 * efficient:6.0f} frames/s   by processor time")


if __name__ == "__main__":
    main()
