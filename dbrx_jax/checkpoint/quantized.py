"""Quantises parameters while they are read, to the same bits for the converter and for loading; and dequantises."""

import dataclasses

import numpy as np
from jax.typing import DTypeLike

from dbrx_jax.checkpoint.folder import CheckpointFolder, rows_per_block, shape_of
from dbrx_jax.checkpoint.parameters import parameter_specs
from dbrx_jax.errors import CheckpointError, QuantizationError
from dbrx_jax.quantization import Format, QuantizedArray, quantize


def read_quantized(
    folder: CheckpointFolder, parameter: str, format: Format, dtype: DTypeLike, start: int, stop: int
) -> QuantizedArray:
    """Reads and quantises rows (first dimension) of a parameter, with one block of float rows in memory at a time.

    Args:
      dtype: of the scales.
      start, stop: must be all rows if the first dimension is contracted (an expert's w2).

    Raises:
      CheckpointError: a weight is infinite or NaN, or the folder's files have changed.
      QuantizationError: the format does not fit the parameter.
    """
    spec = parameter_specs(folder.config)[parameter]
    shapes = spec.quantized(format, dtype)
    factor = shape_of(folder, parameter)[0] // spec.shape[0]  # published rows per row: a head is head_dim of them
    rows_contracted = -len(spec.shape) in spec.contracted
    step = stop - start if rows_contracted else rows_per_block(spec.shape, folder.parameter_dtype(parameter).itemsize)
    result = None
    for first in range(start, stop, step):
        last = min(first + step, stop)
        rows = folder.rows(parameter, first * factor, last * factor).reshape(last - first, *spec.shape[1:])
        try:
            block = quantize(rows, format, spec.contracted, dtype)
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


def read_dequantized(
    folder: CheckpointFolder, parameter: str, shapes: QuantizedArray, start: int, stop: int
) -> np.ndarray:
    """Reads and dequantises rows of a parameter; reads whole groups (or packed pairs) where rows are contracted.

    Args:
      folder: one that stores the parameter quantised.
      shapes: of the parameter, its values and its scale.
    """
    rows_contracted = shapes.contracted[-1] == -shapes.ndim
    unit = (shapes.group or 2) if rows_contracted else 1
    first, last = start // unit * unit, min(-(-stop // unit) * unit, shapes.shape[0])
    packed = 2 if rows_contracted and shapes.kind == "int4" else 1  # rows per stored row
    rows_per_scale = shapes.shape[0] // shapes.scale.shape[0]
    array = dataclasses.replace(
        shapes,
        values=folder.stored_rows(parameter, "values", first // packed, -(-last // packed)),
        scale=folder.stored_rows(parameter, "scale", first // rows_per_scale, -(-last // rows_per_scale)),
    )
    return array.dequantize()[start - first : stop - first]
