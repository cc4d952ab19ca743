"""Memory-mapped arrays of an uncompressed .npz file."""

import io
import mmap
import struct
import zipfile
import zlib
from math import prod
from typing import IO

import numpy as np

LOCAL_HEADER = 30  # bytes of a zip entry's own header, before its name; two lengths end it


def map_npz(file: IO[bytes], check: bool = True) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
    """Map the arrays of an .npz file written by `numpy.savez`.

    The arrays are pages of the file, which all processes share and the system can evict. They are not aligned, which
    numpy supports.

    Args:
        file: The open file; it may be closed and deleted afterwards. Overwriting it in place would kill the process.
        check: Whether to read the whole file once and compare checksums.

    Returns:
        The arrays by name, read-only; and the checksum of each.

    Raises:
        ValueError: The file has another format, or an array is compressed, contains objects, or has a wrong checksum.
        zipfile.BadZipFile: The file is not an .npz file.
    """
    content: mmap.mmap | bytes
    try:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError:  # some network file systems cannot map files
        content = file.read()
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{entry.filename} is compressed")
        name, extra = struct.unpack_from("<HH", content, entry.header_offset + LOCAL_HEADER - 4)
        begin = entry.header_offset + LOCAL_HEADER + name + extra
        end = begin + entry.file_size
        if check and zlib.crc32(memoryview(content)[begin:end]) != entry.CRC:
            raise ValueError(f"the checksum of {entry.filename} is wrong")
        header = io.BytesIO(content[begin : min(end, begin + 2**16)])
        if np.lib.format.read_magic(header) != (1, 0):
            raise ValueError(f"{entry.filename} is not a .npy file of version 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
        data = begin + header.tell()
        if dtype.hasobject or data + prod(shape) * dtype.itemsize != end:
            raise ValueError(f"{entry.filename} is not a plain array")
        array: np.ndarray = np.ndarray(shape, dtype, content, data, order="F" if fortran else "C")
        arrays[entry.filename.removesuffix(".npy")] = array
    return arrays, tuple(entry.CRC for entry in entries)
