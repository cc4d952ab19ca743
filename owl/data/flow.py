"""Optical flow between neighbouring frames, by OpenCV's DIS (Kroeger et al. 2016, arXiv:1603.03590), and its sum."""

import cv2
import numpy as np

from owl.errors import OwlError


def flow_downscale(size: tuple[int, int]) -> int:
    """Return the pixels of an (H, W) frame per cell of its flow grid: 2, 4 if W is above 320, 1 if not divisible.

    At 360x640, DIS to the finest scale at a quarter of the resolution warps one frame onto the next as well as DIS to
    the second finest scale at half of it, with a third of the bytes and half of the time.
    """
    wanted = 4 if size[1] > 320 else 2
    return next(cell for cell in (wanted, 2, 1) if not (size[0] % cell or size[1] % cell))


def estimate_flow(previous: np.ndarray, current: np.ndarray, downscale: int) -> np.ndarray:
    """Estimate the backward optical flow: the displacement of each cell of the current frame to the previous frame.

    Args:
        previous: uint8[H, W, 3], RGB.
        current: uint8[H, W, 3], RGB, one frame later.
        downscale: Pixels per cell of the grid on which flow is computed.

    Returns:
        float32[H // downscale, W // downscale, 2], (dx, dy) in pixels of the frames; independent of the number of
        threads.

    Raises:
        OwlError: The frames are too small for the coarsest level of DIS.
    """
    size = (current.shape[1] // downscale, current.shape[0] // downscale)
    grey = [
        cv2.resize(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA)
        for rgb in (current, previous)
    ]
    try:
        estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        estimator.setFinestScale(0)
        flow: np.ndarray = estimator.calc(grey[0], grey[1], None)  # type: ignore[call-overload]  # no first guess
    except cv2.error as error:
        height, width = current.shape[:2]
        raise OwlError(
            "flow.size",
            f"optical flow cannot be computed on {height}x{width} frames; use at least 64x64 or leave flow out",
        ) from error
    return flow * np.float32(downscale)


def compose_flow(later: np.ndarray, earlier: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Compose two backward flow fields: later(x) + earlier(x + later(x)).

    Points that leave the picture in between take the flow at its border.

    Args:
        later: float32[h, w, 2], (dx, dy) from a frame back to an intermediate frame, in pixels of the picture.
        earlier: float32[h, w, 2], (dx, dy) from the intermediate frame back to an earlier one.
        size: (H, W) of the picture; the fields have a coarser grid.

    Returns:
        float32[h, w, 2].
    """
    height, width = later.shape[:2]
    row, column = np.mgrid[:height, :width].astype(np.float32)
    x, y = column + later[..., 0] * (width / size[1]), row + later[..., 1] * (height / size[0])
    return later + cv2.remap(earlier, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
