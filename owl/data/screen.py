"""The game's screen: resolution, crop, camera, depth and labels."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from owl.data.codecs import nearest, resize
from owl.errors import OwlError

# The game draws without antialiasing: small pictures are drawn at twice their size and averaged, or the walls far away
# would be noise that no latent can hold. Up to this width in pixels, beyond which drawing would be what takes the time.
LARGEST_OVERSAMPLED = 640
FLOOR, WALL, OBJECT, SELF = 0, 1, 2, 255
"""Labels: floors, ceilings and the sky; walls; the first object; in the game's own buffer what the player holds."""
LABEL_NAMES = {FLOOR: "FloorCeilingSky", WALL: "Wall"}
DEPTH_STEP = 7.143
"""Map units from one level of the depth buffer to the next."""


def load_vizdoom() -> Any:
    """Import ViZDoom.

    Raises:
        OwlError: It is not installed.
    """
    try:
        import vizdoom
    except ImportError as error:
        raise OwlError(
            "game.package", f"recording needs the package vizdoom ({error}); install it with `pip install vizdoom`"
        ) from error
    return vizdoom


def find_resolution(size: tuple[int, int]) -> Any:
    """Return the smallest screen that covers (H, W) twice in each direction, or once for large sizes.

    Raises:
        OwlError: The size is larger than all screens.
    """
    return _resolutions()[_screen(size)]


def _resolutions() -> dict[tuple[int, int], Any]:
    """Return the game's screens by (H, W)."""
    resolutions = {}
    for name, resolution in load_vizdoom().ScreenResolution.__members__.items():
        width, height = map(int, name.removeprefix("RES_").split("X"))
        resolutions[height, width] = resolution
    return resolutions


def _screen(size: tuple[int, int]) -> tuple[int, int]:
    """Return the (H, W) of the screen for pictures of (H, W)."""
    oversampling = 2 if 2 * size[1] <= LARGEST_OVERSAMPLED else 1
    wanted = (oversampling * size[0], oversampling * size[1])
    covering = [screen for screen in _resolutions() if screen[0] >= wanted[0] and screen[1] >= wanted[1]]
    if not covering or min(size) < 1:
        raise OwlError(
            "game.size",
            f"size {size[0]}x{size[1]} (height x width) is larger than the game can draw, expected up to "
            "1080x1920; use a smaller size",
        )
    return min(covering, key=lambda screen: screen[0] * screen[1])


def crop(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the largest central crop of a picture with the aspect ratio of (H, W)."""
    top, left, rows, columns = _crop_box(picture.shape[:2], size)
    return picture[top : top + rows, left : left + columns]


def _crop_box(screen: Sequence[int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the crop."""
    height, width = screen
    scale = min(height / size[0], width / size[1])
    rows, columns = round(size[0] * scale), round(size[1] * scale)
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def fit(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the central crop of a picture of the screen, resized to (H, W) by area average."""
    return resize(np.ascontiguousarray(crop(picture, size)), size)


def camera(variables: Sequence[float], screen: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Return the camera of a picture that `fit` computes from the screen.

    The game draws for pixels that are 1.2 times as high as wide on a screen of 4:3; its field of view is that of such a
    screen, and a wider one shows more at the sides. It looks up and down by moving the picture plane (a shear).

    Args:
        variables: CAMERA_POSITION_X, _Y, _Z in map units, CAMERA_ANGLE, CAMERA_PITCH, CAMERA_FOV in degrees.
        screen: (H, W) of the game's screen.
        size: (H, W) of the picture.

    Returns:
        float32[9]: x, y, z, angle, pitch, fx, fy, cx, cy, with `owl.data.geometry`'s units and directions.
    """
    *position, angle, pitch, field_of_view = (float(value) for value in variables)
    height, width = screen
    fx = 2 * height / 3 / math.tan(math.radians(field_of_view) / 2)
    fy = 1.2 * fx
    cx, cy = width / 2, height / 2 - fy * math.tan(math.radians(pitch))
    top, left, rows, columns = _crop_box(screen, size)
    across, down = size[1] / columns, size[0] / rows
    intrinsics = (fx * across, fy * down, (cx - left) * across, (cy - top) * down)
    return np.array([*position, angle, pitch, *intrinsics], np.float32)


def depth_offset(size: tuple[int, int]) -> float:
    """Return the levels to add to the depth buffer before multiplying by ``DEPTH_STEP``, for pictures of (H, W).

    The game rounds down, by more on larger screens. Measured on my_way_home as the best value for reprojection:
    1.2 levels at 120 to 240 rows, 1.6 at 320, 2.0 at 360 and 480, 2.8 at 600, 3.2 at 720.
    """
    return max(1.2, _screen(size)[0] / 225)


def read_labels(state: Any, size: tuple[int, int]) -> tuple[np.ndarray, dict[int, str]]:
    """Return the labels of a frame, with constant object numbers instead of the buffer's, which change every frame.

    Args:
        state: State of the game.
        size: (H, W) of the picture.

    Returns:
        uint16[H, W], numbers, and the name of each: 0 and 1 as in `LABEL_NAMES`, higher numbers are objects and stay
        constant until a cut; "Self" is the player with its weapon.
    """
    numbers, names = np.zeros(256, np.uint16), dict(LABEL_NAMES)
    numbers[WALL] = WALL
    for label in state.labels:
        numbers[label.value] = number = OBJECT + label.object_id
        names[number] = "Self" if label.value == SELF else label.object_name
    return nearest(crop(numbers[state.labels_buffer], size), size), names
