"""Moving rows of parameters from a checkpoint to an open file."""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dbrx_jax.checkpoint.folder import CheckpointFolder, rows_per_block, shape_of
from dbrx_jax.checkpoint.raw_arrays import copy_range, count_not_finite, read_bytes, write_all
from dbrx_jax.files import is_remote

# What the kernel copied is looked through again in blocks that stay in the processor's cache.
LOOK = 1 << 20  # bytes


def append_rows(
    checkpoint: CheckpointFolder, parameter: str, start: int, stop: int, dtype: np.dtype, file: BinaryIO
) -> int:
    """Appends rows of a parameter, in its published shape, to an open file; returns how many values are not finite.

    Bytes that need no change are copied by the operating system; others go through memory in blocks.

    Raises:
      CheckpointError: a file of the checkpoint has become shorter, or cannot be read any more.
    """
    pieces = None
    if (
        checkpoint.parameter_dtype(parameter) == dtype
        and not is_remote(checkpoint.path)
        and isinstance(file, io.FileIO)
    ):
        pieces = checkpoint.pieces(parameter, start, stop)
    if pieces is None:
        count = 0
        for rows in _blocks(checkpoint, parameter, start, stop, dtype):
            write_all(file, rows)
            count += count_not_finite(rows)
        return count
    for source, offset, length in pieces:
        copy_range(source, offset, length, file)
    return sum(_not_finite_in(*piece, dtype) for piece in pieces)


def not_finite(checkpoint: CheckpointFolder, parameter: str, dtype: np.dtype) -> int:
    """Counts a parameter's values that are infinite or NaN once they are cast to dtype."""
    rows = shape_of(checkpoint, parameter)[0]
    return sum(count_not_finite(block) for block in _blocks(checkpoint, parameter, 0, rows, dtype))


def digest(checkpoint: CheckpointFolder, parameter: str, dtype: np.dtype) -> str:
    """SHA-256 of a parameter's bytes, cast to dtype."""
    result = hashlib.sha256()
    for rows in _blocks(checkpoint, parameter, 0, shape_of(checkpoint, parameter)[0], dtype):
        result.update(np.ascontiguousarray(rows).view(np.uint8).reshape(-1).data)
    return result.hexdigest()


def _blocks(
    checkpoint: CheckpointFolder, parameter: str, start: int, stop: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Some rows of a parameter, cast to dtype, a few at a time."""
    step = rows_per_block(shape_of(checkpoint, parameter), checkpoint.parameter_dtype(parameter).itemsize)
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is counted
        for first in range(start, stop, step):
            yield checkpoint.rows(parameter, first, min(first + step, stop)).astype(dtype, copy=False)


def _not_finite_in(source: Path, offset: int, length: int, dtype: np.dtype) -> int:
    return sum(
        count_not_finite(read_bytes([(source, offset + at, min(LOOK, length - at))]).view(dtype))
        for at in range(0, length, LOOK)
    )
