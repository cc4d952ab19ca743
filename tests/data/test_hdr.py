"""Tone mapping: greys in order and grey, reference white near white, colours kept; in PQ and HLG, through a file."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from owl.data.hdr import HLG, PQ, TO_BT709, to_sdr
from owl.data.video import probe, read_frames, to_picture


def pq(light: np.ndarray) -> np.ndarray:
    """cd/m2 to PQ codes in [0, 1], as SMPTE ST 2084 writes it."""
    y = (np.asarray(light, float) / 10_000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


def hlg(scene: np.ndarray) -> np.ndarray:
    """Light of the scene in [0, 1] to HLG codes in [0, 1] (ITU-R BT.2100)."""
    scene = np.asarray(scene, float)
    curve = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), curve)


def mapped(code: np.ndarray, transfer: int) -> np.ndarray:
    """uint8[n, 3] of codes float[n, 3]."""
    return to_sdr(np.rint(code * 65535).astype(np.uint16)[None], transfer)[0]


def test_what_an_ordinary_display_can_show_stays_and_the_rest_is_compressed() -> None:
    light = np.array([0, 1, 5, 20, 50, 80, 203, 500, 1000, 4000, 10_000.0])
    grey = mapped(np.repeat(pq(light)[:, None], 3, 1), PQ)
    assert np.ptp(grey.astype(int), 1).max() <= 1
    shown = grey[:, 0].astype(float)
    # BT.1886: light = white * (code / 255) ** 2.4, exact below the knee
    assert shown[:5] == pytest.approx(255 * (light[:5] / 203) ** (1 / 2.4), abs=1.5)
    assert np.all(np.diff(shown[:9]) > 0)
    assert 190 < shown[6] < 235  # reference white keeps room above it
    assert list(shown[8:]) == [255, 255, 255]


def test_hlg_and_pq_of_the_same_light_look_the_same() -> None:
    scene = np.array([0.001, 0.01, 0.05, 0.2, 0.5, 1.0])
    light = 1000 * scene**1.2
    grey = mapped(np.repeat(hlg(scene)[:, None], 3, 1), HLG).astype(int)
    assert np.abs(grey - mapped(np.repeat(pq(light)[:, None], 3, 1), PQ)).max() <= 2


def test_colours_of_bt709_come_back() -> None:
    wanted = np.array([[100, 0, 0], [0, 100, 0], [0, 0, 100], [80, 40, 20], [60, 60, 0]], float)
    code = pq(np.maximum(wanted @ np.linalg.inv(TO_BT709.astype(float)).T, 0))
    shown = 203 * (mapped(code, PQ) / 255.0) ** 2.4
    scale = shown.max(1, keepdims=True) / wanted.max(1, keepdims=True)
    assert scale.min() > 0.75
    assert shown / scale == pytest.approx(wanted, abs=4)


@pytest.mark.parametrize(("transfer", "code"), [(PQ, float(pq(np.array(100.0)))), (HLG, float(hlg(np.array(0.1))))])
def test_a_video_says_that_it_is_of_high_dynamic_range(tmp_path: Path, transfer: int, code: float) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        video = container.add_stream("libx265", rate=30)
        video.height, video.width, video.pix_fmt = 64, 64, "yuv420p10le"
        context = video.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = transfer, 9, 9, 1
        video.options = {"x265-params": "log-level=none", "preset": "ultrafast"}
        for number in range(3):
            frame = av.VideoFrame(64, 64, "yuv420p10le")
            for plane, value in zip(frame.planes, (round(64 + 876 * code), 512, 512), strict=True):
                plane.update(np.full(plane.buffer_size // 2, value, np.uint16).tobytes())
            frame.pts, frame.time_base = number, Fraction(1, 30)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    facts = probe(tmp_path / "a.mkv")
    frames = list(read_frames(facts, facts.rate))
    assert len(frames) == 3
    expected = mapped(np.full((1, 3), code), transfer)[0]
    assert np.abs(to_picture(frames[1], facts.size).astype(int) - expected).max() <= 3
    assert abs(int(expected[0]) - 255 * code) > 15  # as it is stored, without a tone curve
