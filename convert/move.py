"""Moving rows of parameters from a checkpoint to an open file."""

import hashlib
from collections.abc import Iterator

import numpy as np

from dbrx_jax.convert.arrays import copy_range, write_all
from dbrx_jax.convert.folder import CheckpointFolder, rows_per_block, shape_of


def append_rows(
    checkpoint: CheckpointFolder, parameter: str, start: int, stop: int, dtype: np.dtype, descriptor: int
) -> None:
    """Appends rows of a parameter, in its published shape, to an open file.

    Bytes that need no change are copied by the operating system; others go through memory in blocks.

    Raises:
      CheckpointError: a file of the checkpoint has become shorter, or cannot be read any more.
    """
    same = checkpoint.parameter_dtype(parameter) == dtype
    pieces = checkpoint.pieces(parameter, start, stop) if same else None
    if pieces is not None:
        for file, offset, count in pieces:
            copy_range(file, offset, count, descriptor)
        return
    for first, last in _blocks(checkpoint, parameter, start, stop):
        rows = checkpoint.rows(parameter, first, last)
        write_all(descriptor, rows.astype(dtype, copy=False))


def digest(checkpoint: CheckpointFolder, parameter: str, dtype: np.dtype) -> str:
    """SHA-256 of a parameter's bytes, cast to dtype."""
    result = hashlib.sha256()
    for first, last in _blocks(checkpoint, parameter, 0, shape_of(checkpoint, parameter)[0]):
        rows = checkpoint.rows(parameter, first, last).astype(dtype, copy=False)
        result.update(np.ascontiguousarray(rows).view(np.uint8).reshape(-1).data)
    return result.hexdigest()


def _blocks(checkpoint: CheckpointFolder, parameter: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    step = rows_per_block(shape_of(checkpoint, parameter), checkpoint.parameter_dtype(parameter).itemsize)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)
