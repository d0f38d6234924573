"""Copies rows of a checkpoint's parameters, counts and hashes them, and counts progress in bytes."""

import hashlib
import io
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeAlias

import numpy as np

from dbrx_jax.checkpoint.folder import CheckpointFolder, rows_per_block, shape_of
from dbrx_jax.checkpoint.raw_arrays import bytes_of, copy_range, count_not_finite, read_bytes, write_all
from dbrx_jax.files import is_remote

Progress: TypeAlias = Callable[[int], None]  # called with the number of bytes done since the last call

CHECK_BLOCK = 1 << 20  # bytes of a copied file that are checked at a time; fits the processor's cache


def append_rows(
    checkpoint: CheckpointFolder,
    parameter: str,
    start: int,
    stop: int,
    dtype: np.dtype,
    file: BinaryIO,
    sha256: "hashlib._Hash | None" = None,
) -> int:
    """Appends rows of a parameter, in its published shape, to an open file.

    Returns the number of infinite or NaN values. Bytes that need no change are copied by the operating system;
    others go through memory in blocks.

    Args:
      sha256: a hash to update with the rows' bytes.

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
            if sha256 is not None:
                sha256.update(bytes_of(rows))
            count += count_not_finite(rows)
        return count
    for source, offset, length in pieces:
        copy_range(source, offset, length, file)
        for first in range(offset, offset + length, CHECK_BLOCK):
            block = read_bytes([(source, first, min(CHECK_BLOCK, offset + length - first))])
            if sha256 is not None:
                sha256.update(block.data)
            count += count_not_finite(block.view(dtype))
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


def _blocks(
    checkpoint: CheckpointFolder, parameter: str, start: int, stop: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Yields rows of a parameter in blocks, cast to `dtype`."""
    step = rows_per_block(shape_of(checkpoint, parameter), checkpoint.parameter_dtype(parameter).itemsize)
    with np.errstate(over="ignore"):  # values that overflow become infinite, and are counted
        for first in range(start, stop, step):
            yield checkpoint.rows(parameter, first, min(first + step, stop)).astype(dtype, copy=False)
