"""``python -m owl data record``: record a dataset from a real game."""

import time
from pathlib import Path

import numpy as np

from owl.cli.arguments import changed, parse_size
from owl.cli.datasets import print_dataset
from owl.data import game
from owl.data.played import PlayedGame, record_played
from owl.data.recorder import GameRecording, record_game
from owl.data.shards import INFO_NAME, ShardIndex
from owl.data.splits import HELD_OUT
from owl.errors import OwlError
from owl.play.log import ActionLog


def main(
    directory: str,
    *,
    actions: list[str] = [],  # noqa: B006  (never changed)
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
    """Record a dataset of ViZDoom (with the free Freedoom assets): pictures and their controls.

    Actions are random, or with --actions those of a person who has played the game with `play --game`.

    After an interruption or a full disk, run the same command again: complete episodes are kept. Episodes are divided
    into train, validation and test (90, 5 and 5 per cent, unless --held_out is set).

    Args:
        directory: Local folder for the dataset; created if missing.
        actions: Action logs of the game (.jsonl), to record what a person has played, with any size and modalities.
        frames: Frames in total; the game has 35 per second, so 20000 are 9.5 minutes of play.
        size: Height x width of the pictures: 96x160 trains on a laptop, 360x640 needs a GPU.
        scenario: deathmatch (an arena with monsters), my_way_home (a maze), health_gathering, defend_the_center and
            other scenarios of ViZDoom, also with a map, such as freedoom2:MAP07, or the path of a .cfg file; an unknown
            name lists all. Several, separated by commas, alternate and have the same share of every split.
        seed: Equal seeds give equal datasets, byte for byte, with any number of workers.
        depth: Record depth maps too.
        flow: Record optical flow too (OpenCV's DIS, on a grid of half or a quarter of the resolution).
        audio: Record stereo sound at 44.1 kHz too; needs the system library libopenal1.
        pose: Record the camera too: position, angle, pitch and intrinsics.
        labels: Record labels too: for each pixel the number of its object, and the objects' names.
        workers: Processes; default: one per core.
        held_out: Share of the episodes for validation, and the same for test. With 0.5 all episodes are held out, for
            evaluation only.
    """
    modalities = {
        "depth": depth,
        "flow": flow,
        "audio": audio,
        "pose": pose,
        "labels": labels,
    }
    recording = GameRecording(
        frames=frames,
        size=parse_size(size),
        scenario=scenario,
        seed=seed,
        modalities=tuple(name for name, is_wanted in modalities.items() if is_wanted),
        workers=workers,
        held_out=held_out,
    )
    if actions:
        random = {"frames": frames, "scenario": scenario, "seed": seed, "held_out": held_out}
        if given := changed(main, random):
            raise OwlError(
                "arguments.actions",
                f"--{given[0]} is {random[given[0]]}, but --actions determine what is played; leave one out",
            )
    is_new = not (Path(directory) / INFO_NAME).exists()
    start = time.monotonic()
    if actions:
        record_played(directory, recording, [played_game(path) for path in actions])
    else:
        record_game(directory, recording)
    seconds = time.monotonic() - start
    # the duration is not meaningful for a continued or complete recording
    rate = f" ({ShardIndex.load(directory).frames / seconds:.0f} frames/s)" if is_new else ""
    print_dataset(directory, rate)


def played_game(path: str) -> PlayedGame:
    """Read an action log of the real game.

    Raises:
        OwlError: It is of a world model, or of another version of the game, which could go differently.
    """
    log = ActionLog.load(path)
    if log.origin.get("kind") != "game":
        raise OwlError(
            "actions.origin",
            f"{path} is of a {log.origin.get('kind')}, expected one of the real game; record it with `play --game`",
        )
    if log.origin["vizdoom"] != game.installed_version():
        raise OwlError(
            "actions.other-game",
            f"{path} was recorded with ViZDoom {log.origin['vizdoom']}, {game.installed_version()} is installed, in "
            "which the same actions could lead elsewhere; install that version",
        )
    controls = np.array([[*action.buttons, *action.axes] for action in log.actions], np.float64)
    return PlayedGame(log.origin["scenario"], log.seed, controls.reshape(-1, len(game.BUTTONS) + len(game.AXES)))
