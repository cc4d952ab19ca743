"""``python -m owl data record``: footage of a real game, ready to train on."""

import re
import shlex
import time
from pathlib import Path

from owl.data.recorder import GameRecording, count_recorded, record_game
from owl.data.shards import INFO_NAME
from owl.data.splits import HELD_OUT
from owl.errors import OwlError


def main(
    directory: str,
    *,
    frames: int = 20000,
    size: str = "96x160",
    scenario: str = "deathmatch",
    seed: int = 0,
    depth: bool = False,
    flow: bool = False,
    audio: bool = False,
    pose: bool = False,
    labels: bool = False,
    workers: int | None = None,
    held_out: float = HELD_OUT,
) -> None:
    """Record a dataset of ViZDoom (with the free Freedoom assets), played at random: pictures and controls in step.

    Killed or out of disk space? Run the same command again: it keeps the episodes that are complete. Episodes are
    divided into train, validation and test (90, 5 and 5 per cent, unless --held_out says otherwise).

    Args:
        directory: Local folder for the dataset; made where needed.
        frames: Frames in total; the game shows 35 a second, so 20000 are 9.5 minutes of play.
        size: Height x width of the pictures: 96x160 trains on a laptop, 360x640 wants a GPU.
        scenario: deathmatch (an arena with monsters), my_way_home (a maze), health_gathering, defend_the_center and
            others that ViZDoom brings along, also with a map, such as freedoom2:MAP07, or the path of your own .cfg; a
            wrong name lists all. Several, with commas between, take turns, with the same share of every split.
        seed: Equal seeds give equal datasets, byte by byte, whatever the number of workers.
        depth: Record depth maps too.
        flow: Record optical flow too (OpenCV's DIS, on a grid of half or a quarter of the resolution).
        audio: Record stereo sound at 44.1 kHz too; needs the system library libopenal1.
        pose: Record the camera too: position, angle, pitch and intrinsics.
        labels: Record labels too: for each pixel the number of its object, and the objects' names.
        workers: Processes; one per core where left out.
        held_out: Share of the episodes for validation, and that for test. At 0.5 nothing is left to train on: for
            measuring a network on what it never saw.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if not match:
        raise OwlError("arguments.size", f"--size is {size}, height x width such as 96x160 was expected; correct it")
    recording = GameRecording(
        frames=frames,
        size=(int(match[1]), int(match[2])),
        scenario=scenario,
        seed=seed,
        depth=depth,
        flow=flow,
        audio=audio,
        pose=pose,
        labels=labels,
        workers=workers,
        held_out=held_out,
    )
    is_new = not (Path(directory) / INFO_NAME).exists()
    began = time.monotonic()
    record_game(directory, recording)
    seconds = time.monotonic() - began
    # a recording that was continued or already complete took other time than this run's
    rate = f" ({frames / seconds:.0f} frames/s)" if is_new else ""
    print(f"{directory} holds {count_recorded(directory):,} frames{rate}")
    print(f"look at it: python -m owl data inspect {shlex.quote(directory)}")
