"""Parameters quantised while they are read: the same bits whether they are stored or used at once."""

import dataclasses

import numpy as np
from jax.typing import DTypeLike

from dbrx_jax.checkpoint.folder import CheckpointFolder, rows_per_block, shape_of
from dbrx_jax.checkpoint.parameters import parameter_specs
from dbrx_jax.errors import CheckpointError, QuantizationError
from dbrx_jax.quantization import Format, QuantizedArray, quantize


def read_quantized(
    folder: CheckpointFolder, parameter: str, form: Format, dtype: DTypeLike, start: int, stop: int
) -> QuantizedArray:
    """Rows of a parameter (along its first dimension) quantised, some of them as floats in memory at a time.

    Args:
      start, stop: all rows, where they are what is summed over (an expert's w2).
      dtype: of the scales.

    Raises:
      CheckpointError: a weight is infinite or NaN, or the folder's files are no longer what they were.
      QuantizationError: the format does not fit the parameter.
    """
    spec = parameter_specs(folder.config)[parameter]
    shapes = spec.quantized(form, dtype)
    factor = shape_of(folder, parameter)[0] // spec.shape[0]  # a row of heads is several published rows
    summed = -len(spec.shape) in spec.contracted
    step = stop - start if summed else rows_per_block(spec.shape, folder.parameter_dtype(parameter).itemsize)
    result = None
    for first in range(start, stop, step):
        last = min(first + step, stop)
        rows = folder.rows(parameter, first * factor, last * factor).reshape(last - first, *spec.shape[1:])
        try:
            block = quantize(rows, form, spec.contracted, dtype)
        except QuantizationError as error:
            raise CheckpointError(f"{folder.path}: {parameter}: {error}") from None
        if first == start and last == stop:
            return block
        if result is None:
            values, scale = (np.empty((stop - start, *a.shape[1:]), a.dtype) for a in (shapes.values, shapes.scale))
            result = dataclasses.replace(shapes, values=values, scale=scale)
        result.values[first - start : last - start] = block.values
        result.scale[first - start : last - start] = block.scale
    assert result is not None
    return result
