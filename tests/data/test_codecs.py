"""Round trips of every member kind, and what decoders say of bytes that are something else."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from owl.data import codecs
from tests.helpers.shards import render


def psnr(x: np.ndarray, y: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((x.astype(float) - y) ** 2))


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    return render(0, 1, (96, 160))["rgb"][0]


def test_rgb_survives_in_its_channel_order(rgb: np.ndarray) -> None:
    data = codecs.encode_rgb(rgb)
    assert psnr(codecs.decode_rgb(data), rgb) > 38
    assert psnr(codecs.decode_rgb(data)[..., ::-1], rgb) < 20
    assert psnr(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB), rgb) > 38


@pytest.mark.parametrize("size", [(48, 80), (24, 40), (47, 80), (50, 90), (13, 21), (96, 160), (96, 40), (120, 200)])
def test_a_reduced_decode_is_the_resized_picture(rgb: np.ndarray, size: tuple[int, int]) -> None:
    small = codecs.decode_rgb(codecs.encode_rgb(rgb), size)
    assert small.shape == (*size, 3)
    assert psnr(small, codecs.resize(rgb, size)) > 33


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_depth_is_exact(depth: np.ndarray) -> None:
    np.testing.assert_array_equal(codecs.decode_depth(codecs.encode_depth(depth)), depth)


@given(
    arrays.arrays(
        np.float32, st.tuples(st.integers(1, 6), st.integers(1, 6), st.just(2)), elements=st.floats(-510, 510, width=32)
    )
)
def test_flow_is_exact_to_half_a_step(flow: np.ndarray) -> None:
    decoded = codecs.decode_flow(codecs.encode_flow(flow))
    assert decoded.dtype == np.float32
    assert np.abs(decoded - flow).max() <= 0.5 / codecs.FLOW_SCALE


def test_flow_is_stored_as_kitti_does() -> None:
    flow = np.zeros((2, 3, 2), np.float32)
    flow[0, 1] = (1.5, -2.25)
    bgr = cv2.imdecode(np.frombuffer(codecs.encode_flow(flow), np.uint8), cv2.IMREAD_UNCHANGED)
    assert bgr.dtype == np.uint16
    assert bgr[0, 1].tolist() == [1, 2**15 - 144, 2**15 + 96]  # B = valid, G = dy, R = dx
    beyond = codecs.decode_flow(codecs.encode_flow(np.full((1, 1, 2), 1e4, np.float32)))
    assert 511 < beyond.max() < 512


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float16])
def test_arrays_are_exact(dtype: type) -> None:
    array = np.arange(12).reshape(6, 2).astype(dtype)
    decoded = codecs.decode_array(codecs.encode_array(array[::-1]))
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, array[::-1])


def test_pickles_are_refused_both_ways() -> None:
    with pytest.raises(ValueError):
        codecs.encode_array(np.array([{}], object))


@pytest.mark.parametrize("decode", [codecs.decode_rgb, codecs.decode_depth, codecs.decode_flow, codecs.decode_array])
@pytest.mark.parametrize("data", [b"", b"not what was expected", bytes(200)])
def test_other_bytes_raise_value_error(decode, data: bytes) -> None:
    with pytest.raises(ValueError):
        decode(data)


def test_a_jpeg_cut_short_raises_value_error(rgb: np.ndarray) -> None:
    data = codecs.encode_rgb(rgb)
    with pytest.raises(ValueError):
        codecs.decode_rgb(data[: len(data) // 2])


def test_pngs_of_the_wrong_kind_are_refused(rgb: np.ndarray) -> None:
    flow, depth = codecs.encode_flow(np.zeros((4, 4, 2), np.float32)), codecs.encode_depth(rgb[..., 0])
    with pytest.raises(ValueError, match="depth PNG holds uint16"):
        codecs.decode_depth(flow)
    with pytest.raises(ValueError, match="flow PNG holds uint8"):
        codecs.decode_flow(depth)
    with pytest.raises(ValueError, match="expected"):
        codecs.encode_depth(rgb)
    with pytest.raises(ValueError, match="expected"):
        codecs.encode_flow(rgb)
