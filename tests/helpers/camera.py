"""Footage of the game with all that reprojection needs, also looking up and down, which the recorder never does."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import vizdoom
from torch import Tensor

from owl.data import game, screen
from owl.data.codecs import nearest
from owl.data.geometry import Camera, agrees, map_units, reproject, warp
from owl.data.modalities.pose import Pose

LEVELS = 2.0  # of the depth buffer, up to which two surfaces are one


class Footage(NamedTuple):
    """An episode.

    Attributes:
        rgb: float[T, 3, H, W].
        depth: float[T, 1, H, W], as stored / 255.
        camera: Of each frame.
        still: bool[T, H, W], what is neither an object nor the player.
        description: Of the depth.
    """

    rgb: Tensor
    depth: Tensor
    camera: Camera
    still: Tensor
    description: dict[str, Any]


def footage(frames: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]], size: tuple[int, int]) -> Footage:
    """Stack rgb, depth, pose and the objects' numbers of an episode's frames."""
    rgb, depth, pose, objects = (torch.from_numpy(np.stack(column)) for column in zip(*frames, strict=True))
    return Footage(
        rgb.movedim(-1, 1).float(),
        depth[:, None].float() / 255,
        Camera(pose[:, :5], pose[:, 5:]),
        objects.int() < screen.OBJECT,
        {"step": screen.DEPTH_STEP, "offset": screen.depth_offset(size)},
    )


def look_about(folder: Path, size: tuple[int, int], frames: int) -> Footage:
    """Walk, turn and look up and down."""
    player = vizdoom.DoomGame()
    player.load_config(str(game.find_scenario("my_way_home")[0]))
    player.set_screen_resolution(screen.find_resolution(size))
    player.set_screen_format(vizdoom.ScreenFormat.RGB24)
    player.set_depth_buffer_enabled(True)
    player.set_labels_buffer_enabled(True)
    for switch in (player.set_render_hud, player.set_render_crosshair, player.set_window_visible):
        switch(False)
    buttons = ("MOVE_FORWARD", "TURN_LEFT_RIGHT_DELTA", "LOOK_UP_DOWN_DELTA")
    player.set_available_buttons([getattr(vizdoom.Button, name) for name in buttons])
    player.set_available_game_variables([getattr(vizdoom.GameVariable, name) for name in Pose.variables])
    player.set_seed(5)
    player.set_doom_config_path(str(folder / "game.ini"))
    with contextlib.chdir(folder):
        player.init()
    shown = []
    for frame in range(frames):
        state = player.get_state()
        objects, _ = screen.read_labels(state, size)
        rgb, depth = screen.fit(state.screen_buffer, size), nearest(screen.crop(state.depth_buffer, size), size)
        shown.append((rgb, depth, screen.camera(state.game_variables, state.screen_buffer.shape[:2], size), objects))
        player.make_action([1, 3 if frame // 10 % 2 else -2, -1.5 if frame // 8 % 2 else 1.5])
    player.close()
    return footage(shown, size)


def reprojection_gain(shown: Footage, gap: int = 4) -> tuple[float, float]:
    """How many times smaller the photometric error of frames is against those ``gap`` earlier, once these are warped.

    Returns:
        Mean absolute error of the earlier frames over that of the warped ones, on what stands still (no sky, no weapon,
        no objects) where the depth of both agrees; and the share of what stands still whose depth agrees.
    """
    depth, step = map_units(shown.depth[:, 0], shown.description), shown.description["step"]
    before, after = slice(None, -gap), slice(gap, None)
    there, here = (Camera(*(part[frames] for part in shown.camera)) for frames in (before, after))
    still = (shown.depth[after, 0] > 0) & (shown.depth[after, 0] < 1) & shown.still[after]
    seen = still & agrees(depth[after], here, depth[before], there, LEVELS * step)
    places, _ = reproject(depth[after], here, there)
    now, earlier = shown.rgb[after], shown.rgb[before]
    errors = [(picture - now).abs().mean(1)[seen].mean().item() for picture in (earlier, warp(earlier, places))]
    return errors[0] / errors[1], seen.sum().item() / still.sum().item()
