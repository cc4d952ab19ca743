"""Encoders and decoders of shard members: one pair of pure functions per kind of member.

Every decoder raises ``ValueError`` on unexpected bytes, so that a reader can name the member.
"""

import io

import cv2
import numpy as np
import simplejpeg

JPEG_QUALITY = 95
FLOW_SCALE = 64.0  # KITTI: uint16 = pixels * 64 + 2**15, so +-511 pixels in steps of 1/64 pixel
FLOW_ZERO = 2**15


def encode_rgb(rgb: np.ndarray, quality: int = JPEG_QUALITY, chroma: str = "420") -> bytes:
    """Compress a frame to baseline JPEG.

    Args:
        rgb: uint8[H, W, 3].
        quality: 1 to 100.
        chroma: Subsampling of the colours; "444" is none.
    """
    return simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=quality, colorspace="RGB", colorsubsampling=chroma)


def decode_rgb(data: bytes | memoryview, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decompress a JPEG, at a reduced scale (1/2, 1/4 or 1/8, inside the decoder) if a smaller size is requested.

    Args:
        data: The JPEG file.
        size: (h, w) of the result; None keeps the stored size.

    Returns:
        uint8[h, w, 3].

    Raises:
        ValueError: The bytes are not a JPEG, or decode with warnings.
    """
    if size is None:
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    # only the scales 1/2, 1/4 and 1/8 have fast transforms: 3/8 takes longer than 1/2
    factor = max(f for f in (1, 2, 4, 8) if f == 1 or (-(-height // f) >= size[0] and -(-width // f) >= size[1]))
    rgb = simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=-(-height // factor), min_width=-(-width // factor))
    return resize(rgb, size)


def encode_depth(depth: np.ndarray) -> bytes:
    """Compress a depth map to 8-bit PNG (lossless). depth: uint8[H, W]."""
    if depth.dtype != np.uint8 or depth.ndim != 2:
        raise ValueError(f"depth is {depth.dtype}{list(depth.shape)}, expected uint8[H, W]")
    return _encode_png(depth)


def decode_depth(data: bytes | memoryview) -> np.ndarray:
    """Decompress a depth map.

    Returns:
        uint8[H, W].

    Raises:
        ValueError: The bytes are not an 8-bit grey PNG.
    """
    depth = _decode_png(data)
    if depth.dtype != np.uint8 or depth.ndim != 2:
        raise ValueError(f"depth PNG holds {depth.dtype}{list(depth.shape)}, expected uint8[H, W]")
    return depth


def encode_flow(flow: np.ndarray) -> bytes:
    """Compress optical flow as KITTI does: 16-bit PNG with R = dx, G = dy, B = 1 (valid), in 1/64 pixel.

    Args:
        flow: float32[h, w, 2], (dx, dy) in pixels; values beyond +-511 pixels are clipped.

    Raises:
        ValueError: It has another shape, or holds NaN or infinity.
    """
    if not np.isfinite(flow).all():
        raise ValueError("flow holds NaN or infinity")
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f"flow has shape {list(flow.shape)}, expected [h, w, 2]")
    fixed = np.clip(np.rint(flow * FLOW_SCALE) + FLOW_ZERO, 0, 2**16 - 1).astype(np.uint16)
    valid = np.ones(flow.shape[:2], np.uint16)
    return _encode_png(np.dstack([valid, fixed[..., 1], fixed[..., 0]]))  # OpenCV's channel order is B, G, R


def decode_flow(data: bytes | memoryview) -> np.ndarray:
    """Decompress optical flow.

    Returns:
        float32[h, w, 2], (dx, dy) in pixels.

    Raises:
        ValueError: The bytes are not a 16-bit PNG of three channels.
    """
    bgr = _decode_png(data)
    if bgr.dtype != np.uint16 or bgr.ndim != 3 or bgr.shape[2] != 3:
        raise ValueError(f"flow PNG holds {bgr.dtype}{list(bgr.shape)}, expected uint16[h, w, 3]")
    return (bgr[..., :0:-1].astype(np.float32) - FLOW_ZERO) / FLOW_SCALE


def encode_array(array: np.ndarray) -> bytes:
    """Store an array (audio, controls, latents) as a .npy file, version 1.0, without pickle."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def decode_array(data: bytes | memoryview) -> np.ndarray:
    """Read a .npy file; pickled objects are rejected.

    Raises:
        ValueError: The bytes are not a .npy file, are truncated, or contain objects.
    """
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize by area average when shrinking, bilinearly when enlarging. image: [H, W] or [H, W, C]; size: (h, w)."""
    height, width = image.shape[:2]
    if (height, width) == tuple(size):
        return image
    shrinking = size[0] <= height and size[1] <= width
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)


def nearest(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize by taking the middle pixel of each area, without mixing values. picture: [H, W, ...]; size: (h, w)."""
    rows, columns = ((np.arange(n) + 0.5) * m / n for n, m in zip(size, picture.shape, strict=False))
    return np.ascontiguousarray(picture[rows.astype(int)[:, None], columns.astype(int)])


def _encode_png(image: np.ndarray) -> bytes:
    # level 1: three times the speed of the default for a few per cent more bytes on depth and flow
    ok, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not ok:
        raise ValueError(f"OpenCV could not write a PNG of {image.dtype}{list(image.shape)}")
    return data.tobytes()


def _decode_png(data: bytes | memoryview) -> np.ndarray:
    if not len(data):
        raise ValueError("the PNG is empty")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ValueError(f"OpenCV could not read the PNG: {error}") from error
    if image is None:
        raise ValueError("the bytes are not a PNG that OpenCV reads")
    return image
