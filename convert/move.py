"""Copies and checks rows of a checkpoint's parameters, and counts progress in bytes."""

import hashlib
import io
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeAlias

import numpy as np

from dbrx_jax.checkpoint.folder import CheckpointFolder, rows_per_block, shape_of
from dbrx_jax.checkpoint.raw_arrays import copy_range, count_not_finite, read_bytes, write_all
from dbrx_jax.files import is_remote

Progress: TypeAlias = Callable[[int], None]  # called with the number of bytes done since the last call

CHECK_BLOCK = 1 << 20  # bytes of a copied file that are checked at a time; fits the processor's cache


def append_rows(
    checkpoint: CheckpointFolder, parameter: str, start: int, stop: int, dtype: np.dtype, file: BinaryIO
) -> int:
    """Appends rows of a parameter, in its published shape, to an open file.

    Returns the number of infinite or NaN values. Bytes that need no change are copied by the operating system;
    others go through memory in blocks.

    Raises:
      CheckpointError: a file of the checkpoint has become shorter, or cannot be read any more.
    """
    same_dtype = checkpoint.parameter_dtype(parameter) == dtype
    is_local = not is_remote(checkpoint.path) and isinstance(file, io.FileIO)
    pieces = checkpoint.pieces(parameter, start, stop) if same_dtype and is_local else None
    count = 0
    if pieces is None:
        for rows in _blocks(checkpoint, parameter, start, stop, dtype):
            write_all(file, rows)
            count += count_not_finite(rows)
        return count
    for source, offset, length in pieces:
        copy_range(source, offset, length, file)
        for first in range(offset, offset + length, CHECK_BLOCK):
            block = (source, first, min(CHECK_BLOCK, offset + length - first))
            count += count_not_finite(read_bytes([block]).view(dtype))
    return count


def byte_progress(checkpoint: CheckpointFolder, progress: Progress | None) -> Callable[[int], None]:
    """Returns a function of a number of weights that calls `progress`, if any, with their average stored bytes."""
    bytes_per_weight = checkpoint.size / checkpoint.config.total_parameters

    def advance(num_weights: int) -> None:
        if progress is not None:
            progress(round(num_weights * bytes_per_weight))

    return advance


def not_finite(checkpoint: CheckpointFolder, parameter: str, dtype: np.dtype) -> int:
    """Returns the number of a parameter's values that are infinite or NaN after a cast to `dtype`."""
    rows = shape_of(checkpoint, parameter)[0]
    return sum(count_not_finite(block) for block in _blocks(checkpoint, parameter, 0, rows, dtype))


def digest(checkpoint: CheckpointFolder, parameter: str, dtype: np.dtype) -> str:
    """Returns the SHA-256 of a parameter's bytes, cast to `dtype`."""
    result = hashlib.sha256()
    for rows in _blocks(checkpoint, parameter, 0, shape_of(checkpoint, parameter)[0], dtype):
        result.update(np.ascontiguousarray(rows).view(np.uint8).reshape(-1).data)
    return result.hexdigest()


def _blocks(
    checkpoint: CheckpointFolder, parameter: str, start: int, stop: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Yields rows of a parameter in blocks, cast to `dtype`."""
    step = rows_per_block(shape_of(checkpoint, parameter), checkpoint.parameter_dtype(parameter).itemsize)
    with np.errstate(over="ignore"):  # values that overflow become infinite, and are counted
        for first in range(start, stop, step):
            yield checkpoint.rows(parameter, first, min(first + step, stop)).astype(dtype, copy=False)
