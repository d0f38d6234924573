"""Arrays on disk as zarr 2 stores them: one folder each, uncompressed in chunks of whole rows.

A chunk's file is nothing but its elements, so writing one is copying bytes, and tensorstore (and
Orbax with it) reads any rows of it on any mesh. Not zarr 3: reading that without OCDBT, Orbax warns
of a malformed checkpoint each time.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from dbrx_jax.errors import CheckpointError

# Small enough for a device to read its rows and little else, large enough that files stay few.
CHUNK = 64 << 20  # bytes, at most unless one row is larger
METADATA = ".zarray"
ALIGNMENT = 64  # bytes
ZARR_DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "bfloat16"}


def chunk_rows(shape: tuple[int, ...], itemsize: int) -> int:
    """Rows in a chunk: the most that fit CHUNK and divide the rows evenly, where that costs few chunks more."""
    rows, row_bytes = shape[0], math.prod(shape[1:]) * itemsize
    least = max(1, -(-rows * row_bytes // CHUNK))
    if least >= rows:
        return 1
    even = next((n for n in range(least, min(2 * least, rows) + 1) if rows % n == 0), least)
    return -(-rows // even)


def metadata(shape: tuple[int, ...], dtype: np.dtype, rows: int, compress: bool) -> str:
    """The .zarray of an array in chunks of `rows` rows (zarr 2 specification; bfloat16 is tensorstore's addition)."""
    return json.dumps(
        {
            "zarr_format": 2,
            "shape": list(shape),
            "chunks": [rows, *shape[1:]],
            "dtype": ZARR_DTYPES[dtype.name],
            "compressor": {"id": "zstd", "level": 1} if compress else None,
            "fill_value": None,
            "order": "C",
            "filters": None,
            "dimension_separator": ".",
        }
    )


def chunk_name(index: int, dimensions: int) -> str:
    return ".".join(map(str, (index, *[0] * (dimensions - 1))))


def write_array(
    folder: Path,
    shape: tuple[int, ...],
    dtype: np.dtype,
    write_rows: Callable[[int, int, int], None],
) -> None:
    """Writes an uncompressed array; the folder appears when it is complete.

    Args:
      write_rows: called with an open file's descriptor and the first and last row to append to it.
    """
    aside = begin_aside(folder)
    rows = chunk_rows(shape, dtype.itemsize)
    size = rows * math.prod(shape[1:]) * dtype.itemsize
    for index, start in enumerate(range(0, shape[0], rows)):
        with (aside / chunk_name(index, len(shape))).open("wb", buffering=0) as f:
            write_rows(f.fileno(), start, min(start + rows, shape[0]))
            f.truncate(size)  # the last chunk is as large as the others
    (aside / METADATA).write_text(metadata(shape, dtype, rows, compress=False))
    aside.rename(folder)


def write_compressed(
    folder: Path, shape: tuple[int, ...], dtype: np.dtype, read_rows: Callable[[int, int], np.ndarray]
) -> None:
    """Writes an array compressed with zstd; the folder appears when it is complete.

    Args:
      read_rows: gives the rows from the first to the last, in the array's shape.
    """
    import tensorstore

    aside = begin_aside(folder)
    rows = chunk_rows(shape, dtype.itemsize)
    (aside / METADATA).write_text(metadata(shape, dtype, rows, compress=True))
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{aside}/"}}
    array = tensorstore.open(spec, open=True).result()
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        array[start:stop].write(read_rows(start, stop)).result()
    aside.rename(folder)


def begin_aside(folder: Path) -> Path:
    """An empty folder beside `folder`, without what a killed run left there."""
    aside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def read_bytes(pieces: Iterable[tuple[Path, int, int]]) -> np.ndarray:
    """Pieces of files (offset and length in bytes), one after another, read into memory.

    Not mapped, as reading a mapped file that shrinks would kill the process. They begin at a multiple
    of ALIGNMENT, so that JAX on a CPU takes them over without a copy.

    Raises:
      CheckpointError: a file has become shorter, or cannot be read any more.
    """
    pieces = list(pieces)
    total = sum(count for _, _, count in pieces)
    buffer = np.empty(total + ALIGNMENT, np.uint8)
    start = at = -buffer.ctypes.data % ALIGNMENT
    for file, offset, count in pieces:
        try:
            with file.open("rb") as f:
                f.seek(offset)
                read = f.readinto(buffer[at : at + count].data)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read any more ({error.strerror})") from None
        if read < count:
            raise CheckpointError(f"{file}: has become shorter while it was read; copy it again")
        at += count
    return buffer[start:at]


def write_all(descriptor: int, data: np.ndarray) -> None:
    """Appends an array's bytes to an open file."""
    view = np.ascontiguousarray(data).view(np.uint8).reshape(-1).data
    while len(view):
        view = view[os.write(descriptor, view) :]


def copy_range(source: Path, offset: int, count: int, descriptor: int) -> None:
    """Appends bytes of a file to an open one inside the kernel.

    Raises:
      CheckpointError: the source ends before.
    """
    with source.open("rb", buffering=0) as f:
        while count:
            copied = _copy_some(f.fileno(), offset, count, descriptor)
            if copied == 0:
                raise CheckpointError(f"{source}: has become shorter while it was read; copy it again")
            offset, count = offset + copied, count - copied


def _copy_some(source: int, offset: int, count: int, descriptor: int) -> int:
    try:
        return os.copy_file_range(source, descriptor, count, offset)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return os.sendfile(descriptor, source, offset, count)  # between file systems that do not know each other
