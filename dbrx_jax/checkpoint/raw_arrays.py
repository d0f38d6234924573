"""Arrays on disk as zarr 2 stores them: one folder each, uncompressed in chunks of whole rows.

A chunk's file is nothing but its elements, so writing one is copying bytes, and tensorstore (and
Orbax with it) reads any rows of it on any mesh. Not zarr 3: reading that without OCDBT, Orbax warns
of a malformed checkpoint each time.
"""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dbrx_jax.errors import CheckpointError
from dbrx_jax.files import is_remote

# Small enough for a device to read its rows and little else, large enough that files stay few.
CHUNK = 64 << 20  # bytes, at most unless one row is larger
METADATA = ".zarray"
ALIGNMENT = 64  # bytes
ZARR_DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "bfloat16", "int8": "|i1", "uint8": "|u1"}
EXPONENTS: dict[str, np.unsignedinteger[Any]] = {
    "float32": np.uint32(0x7F800000),
    "float16": np.uint16(0x7C00),
    "bfloat16": np.uint16(0x7F80),
}
CACHED = 1 << 17  # elements


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
    folder: Path, shape: tuple[int, ...], dtype: np.dtype, write_rows: Callable[[BinaryIO, int, int], None]
) -> None:
    """Writes an uncompressed array; it can be read when it is complete, and not before.

    On a local disk the folder appears at the end. Elsewhere, where nothing can be renamed, its
    description does.

    Args:
      write_rows: called with a file and the first and last row to append to it.
    """
    aside = folder if is_remote(folder) else begin_aside(folder)
    rows = chunk_rows(shape, dtype.itemsize)
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    for index, start in enumerate(range(0, shape[0], rows)):
        file, stop = aside / chunk_name(index, len(shape)), min(start + rows, shape[0])
        with writing(file) as f:
            write_rows(f, start, stop)
            # The last chunk is as large as the others.
            write_all(f, np.zeros((start + rows - stop) * row_bytes, np.uint8))
    (aside / METADATA).write_text(metadata(shape, dtype, rows, compress=False))
    if aside is not folder:
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


@contextlib.contextmanager
def writing(file: Path) -> Iterator[BinaryIO]:
    """A new file to write to, which appears under its name when the block is left without an error."""
    if not is_remote(file):
        aside = file.with_name(f"{file.name}.part")
        with aside.open("wb", buffering=0) as f:
            yield f
        aside.rename(file)
        return
    remote: Any = file.open("wb")
    try:
        yield remote
    except BaseException:
        remote.discard()  # closing would complete the upload
        file.unlink(missing_ok=True)
        raise
    remote.close()


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
            read = _read_into(file, offset, buffer[at : at + count].data)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read any more ({error.strerror or error})") from None
        if read < count:
            raise CheckpointError(f"{file}: has become shorter while it was read; copy it again")
        at += count
    return buffer[start:at]


def _read_into(file: Any, offset: int, buffer: memoryview) -> int:
    """Fills the buffer from a file; returns how many bytes there were."""
    if is_remote(file):
        data = file.fs.cat_file(file.path, offset, offset + len(buffer))  # one request
        buffer[: len(data)] = data
        return len(data)
    with file.open("rb") as f:
        f.seek(offset)
        return f.readinto(buffer)


def write_all(file: BinaryIO, data: np.ndarray) -> None:
    """Appends an array's bytes to an open file."""
    view = np.ascontiguousarray(data).view(np.uint8).reshape(-1).data
    while len(view):
        view = view[file.write(view) :]


def copy_range(source: Path, offset: int, count: int, file: BinaryIO) -> None:
    """Appends bytes of a local file to an open one inside the kernel.

    Raises:
      CheckpointError: the source ends before.
    """
    with source.open("rb", buffering=0) as f:
        while count:
            copied = _copy_some(f.fileno(), offset, count, file.fileno())
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


def count_not_finite(values: np.ndarray) -> int:
    """Counts elements that are infinite or NaN: those whose exponent has every bit set.

    On the bits, in blocks that stay in the processor's cache: 10 times as fast as isfinite on bfloat16.
    """
    exponent = EXPONENTS[values.dtype.name]
    bits = np.ascontiguousarray(values).reshape(-1).view(exponent.dtype)
    count = 0
    for start in range(0, len(bits), CACHED):
        exponents = bits[start : start + CACHED] & exponent
        if exponents.max() == exponent:
            count += int((exponents == exponent).sum())
    return count
