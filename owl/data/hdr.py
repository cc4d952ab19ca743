"""Conversion of high dynamic range pictures, PQ and HLG in BT.2020 colours, to standard dynamic range.

FFmpeg's scale filter also supports this, but takes five seconds per video to prepare its table.
"""

from functools import cache

import numpy as np

PQ, HLG = 16, 18
TRANSFERS = (PQ, HLG)
"""Transfer characteristics of high dynamic range (ITU-T H.273, table 3)."""
PEAK = 1000.0
"""cd/m2 of the brightest source white: the nominal peak of HLG, and what most PQ pictures are graded for."""
WHITE = 203.0
"""cd/m2 of the white that is shown as 255: reference white of ITU-R BT.2408."""
TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)
"""Linear BT.2020 to linear BT.709 (ITU-R BT.2407, 2.2)."""


def to_sdr(rgb: np.ndarray, transfer: int) -> np.ndarray:
    """Tone-map a picture with the curve of ITU-R BT.2390 (5.4.1), applied to the brightest channel.

    Args:
        rgb: uint16[H, W, 3], full range, in BT.2020 colours.
        transfer: PQ or HLG.

    Returns:
        uint8[H, W, 3], BT.709 colours for a display of gamma 2.4 (BT.1886).
    """
    light = _light(transfer)[rgb]
    if transfer == HLG:  # the display's share: BT.2100 table 5, gamma 1.2 at 1000 cd/m2
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= PEAK * np.maximum(luminance, 1e-6)[..., None] ** np.float32(0.2)
    brightest = np.maximum(light.max(-1, keepdims=True), np.float32(1e-4))
    mapped = np.interp(_pq(np.minimum(brightest, PEAK)), *_curve()).astype(np.float32)
    linear = (light * (mapped / brightest)) @ TO_BT709.T
    return np.rint(255 * np.clip(linear, 0, 1) ** np.float32(1 / 2.4)).astype(np.uint8)


@cache
def _light(transfer: int) -> np.ndarray:
    """Light of every 16-bit code, float32[65536]: cd/m2 for PQ, relative light of the scene for HLG (ITU-R BT.2100)."""
    signal = np.linspace(0, 1, 2**16)
    if transfer == PQ:
        return _inverse_pq(signal).astype(np.float32)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12).astype(np.float32)


@cache
def _curve() -> tuple[np.ndarray, np.ndarray]:
    """The tone curve as a table: PQ codes of the source, and the light to show, 1 being white (BT.2390, 5.4.1)."""
    peak, white = _pq(np.array([PEAK, WHITE]))
    code = np.linspace(0, 1, 1025)
    highest = white / peak
    knee = 1.5 * highest - 0.5
    t = np.clip((code - knee) / (1 - knee), 0, 1)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * highest
    return code * peak, _inverse_pq(np.where(code < knee, code, spline) * peak) / WHITE


def _pq(light: np.ndarray) -> np.ndarray:
    """cd/m2 to PQ codes in [0, 1] (SMPTE ST 2084)."""
    y = (light / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def _inverse_pq(code: np.ndarray) -> np.ndarray:
    root = code ** (1 / 78.84375)
    return 10_000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
